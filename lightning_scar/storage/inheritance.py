"""What dead starts of a run have left in this host's memory, until nobody needs it any more."""

from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from lightning_scar.storage.delta import Delta
from lightning_scar.storage.directory import Tier
from lightning_scar.storage.head import Head
from lightning_scar.storage.host_memory import HostMemory
from lightning_scar.storage.index import Index
from lightning_scar.storage.spill import Spill
from lightning_scar.storage.store import DeltaStore


class Inheritance:
    """The folders that one start of a run goes on from, to be read.

    Args:
        host: The memory that they lie in.

    """

    def __init__(self, host: HostMemory) -> None:
        self._host = host
        #: One for each dead start, the newest first.
        self.stores: Sequence[DeltaStore] = [DeltaStore(path, tier=Tier.MEMORY) for path in host.inherited]

    def look_around(self) -> None:
        """Forgets what somebody has removed: another rank that needs it no more, or who must not hold up the saves."""
        for store in self.stores:
            for folder in {delta.name.split("/")[0] for delta in store.deltas}:
                with suppress(OSError):
                    store.forget_vanished(folder)

    def bring_to_storage(self, spill: Spill, head: Head) -> None:
        """Takes over as it is what was not saved anew, such as a block that holds NaN by now.

        Args:
            spill: Leads to storage.
            head: That of the save which makes the rest of it obsolete.

        Raises:
            OSError: If it cannot be written.

        """
        self.look_around()
        with ExitStack() as files:
            found = [copy for store in self.stores for copy in spill.newer(store, store.deltas, files).copies]
            newest = {copy.block.key: copy for copy in sorted(found, key=lambda copy: copy.block.version)}
            if newest:
                spill.take_over(head, list(newest.values()))

    def forget(self, remove: bool) -> None:
        """Lets go of it.

        Args:
            remove: Whether to remove it, as one process of a host does.

        """
        self._forget(self.stores, remove)

    def forget_obsolete(self, storage: Index, was_read: Collection[Delta], remove: bool) -> None:
        """Lets go of starts of which later ones and storage have every block as new, and intact as far as it was read.

        Else memory would grow with every start that dies before storage has all that it saved.

        Args:
            storage: What storage holds.
            was_read: From where the state was restored.
            remove: As in :meth:`forget`.

        """
        indices = [store.index for store in self.stores]
        needed = {delta.directory.path for delta in was_read}
        obsolete = [
            store
            for i, store in enumerate(self.stores)
            if store.directory.path not in needed and _is_overtaken(store.index, [*indices[:i], storage])
        ]
        self._forget(obsolete, remove)

    def _forget(self, stores: Sequence[DeltaStore], remove: bool) -> None:
        self._host.forget_inherited([Path(store.directory.path) for store in stores], remove)
        self.stores = [store for store in self.stores if store not in stores]


def _is_overtaken(index: Index, others: Sequence[Index]) -> bool:
    """Whether others have every block of an index at least as new."""
    newest = ((index.newest(key), [other.newest(key) for other in others]) for key in map(str, index.keys()))
    return all(
        block is None or any(other is not None and other.version >= block.version for other in found)
        for block, found in newest
    )
