"""Several places that hold deltas of one running checkpoint, read as one: memory, and storage."""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from typing_extensions import override

from lightning_scar.storage.collection import no_collection
from lightning_scar.storage.delta import Delta, StoredBlock
from lightning_scar.storage.directory import Tier
from lightning_scar.storage.head import Head, Mark, newest_heads
from lightning_scar.storage.host_memory import left_in_memory
from lightning_scar.storage.index import Index, Located, Refreshed, newest_lineage, recency
from lightning_scar.storage.store import DeltaStore, Store


class TieredIndex(Index):
    """The versions of every block in several tiers; of equal versions the nearest comes first.

    Args:
        tiers: Gives the index of each tier, the nearest first, storage last.

    """

    def __init__(self, tiers: Callable[[], Sequence[Index]]) -> None:
        super().__init__(())
        self._tiers = tiers

    @property
    @override
    def lineage(self) -> tuple[int, ...]:
        return self._tiers()[-1].lineage

    @property
    @override
    def heads(self) -> dict[int, Head]:
        return newest_heads(head for tier in self._tiers() for head in tier.heads.values())

    @property
    @override
    def consistent(self) -> Mark | None:
        # Memory keeps no version for it.
        return self._tiers()[-1].consistent

    @override
    def keys(self) -> Iterator[str]:
        return iter(dict.fromkeys(chain.from_iterable(tier.keys() for tier in self._tiers())))

    @override
    def versions(self, key: str) -> list[Located]:
        found = [at for tier in self._tiers() for at in tier.versions(key)]
        return sorted(found, key=recency, reverse=True)

    @override
    def newest(self, key: str) -> StoredBlock | None:
        found = self.versions(key)
        return found[0].block if found else None

    @override
    def live(self, delta: Delta) -> list[StoredBlock]:
        return [block for tier in self._tiers() for block in tier.live(delta)]

    @override
    def refreshes(self, block: StoredBlock) -> list[Refreshed]:
        found = [at for tier in self._tiers() for at in tier.refreshes(block)]
        return sorted(found, key=lambda at: at.delta.head.recency, reverse=True)

    @override
    def discard(self, located: Located) -> None:
        for tier in self._tiers():
            tier.discard(located)


class TieredStore(Store):
    """The deltas of several stores.

    Args:
        stores: The stores, the nearest first, storage last.

    Attributes:
        stores: The same.
        listed: Those of them that have been listed for good: :meth:`refresh` leaves them as they are.

    """

    def __init__(self, stores: Sequence[DeltaStore]) -> None:
        super().__init__(stores[-1].directory, TieredIndex(lambda: [store.index for store in self.stores]))
        self.stores = list(stores)
        self.listed: Sequence[DeltaStore] = []

    @property
    @override
    def deltas(self) -> list[Delta]:
        return [delta for store in self.stores for delta in store.deltas]

    @override
    def is_empty(self) -> bool:
        return all(store.is_empty() for store in self.stores)

    @override
    def refresh(self) -> None:
        with no_collection():
            for store in self.stores:
                if store not in self.listed:
                    store.refresh()
            self.count(newest_lineage(self.deltas))
        self.damaged = [damage for store in self.stores for damage in store.damaged]

    @override
    def count(self, lineage: Sequence[int]) -> None:
        for store in self.stores:
            if store.index.lineage != tuple(lineage):
                store.count(lineage)

    @override
    def folders(self) -> list[str]:
        return sorted({folder for store in self.stores for folder in store.folders()})


def open_store(url: str | os.PathLike[str], storage_options: dict[str, Any] | None = None) -> Store:
    """A running checkpoint to read: its directory, and what its newest start has left in this host's memory.

    Args:
        url: The directory, any fsspec URL.
        storage_options: Passed to the file system.

    Example::

        >>> open_store("memory://no-run-here").is_empty()
        True

    """
    storage = DeltaStore(url, storage_options)
    in_memory = [DeltaStore(path, tier=Tier.MEMORY) for path in left_in_memory(storage.directory)]
    return TieredStore([*in_memory, storage]) if in_memory else storage
