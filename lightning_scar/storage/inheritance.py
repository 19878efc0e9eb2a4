"""What dead starts of a run have left in this host's memory, until nobody needs it any more."""

from collections.abc import Sequence
from contextlib import ExitStack

from lightning_scar.storage.delta import BlockData
from lightning_scar.storage.directory import Tier
from lightning_scar.storage.host_memory import HostMemory
from lightning_scar.storage.index import Index
from lightning_scar.storage.rank_store import newer
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

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return self._host.inherited_bytes if self.stores else 0

    def newer(self, than: Index, files: ExitStack) -> list[BlockData]:
        """The newest versions of what storage has not as new, such as a block that holds NaN by now.

        Args:
            than: What storage has.
            files: Closes what is opened.

        """
        for store in self.stores:
            # What somebody else has removed must not hold up the saves.
            for folder in {delta.name.split("/")[0] for delta in store.deltas}:
                store.forget_vanished(folder)
        found = [block for store in self.stores for block in newer(store, store.deltas, than, files)]
        return list({block.key: block for block in sorted(found, key=lambda block: block.version)}.values())

    def forget(self, remove: bool) -> None:
        """Lets go of it.

        Args:
            remove: Whether to remove it, as one process of a host does.

        """
        self._host.forget_inherited(remove)
        self.stores = []
