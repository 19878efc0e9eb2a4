"""One rank's deltas in the memory of its host, which may be full, and which somebody may remove."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from typing_extensions import override

from lightning_scar.storage.compaction import NEWEST_ONLY
from lightning_scar.storage.delta import Refresh, Section
from lightning_scar.storage.directory import Tier
from lightning_scar.storage.head import Head
from lightning_scar.storage.host_memory import HostMemory
from lightning_scar.storage.rank_store import RankStore


class MemoryStore(RankStore):
    """The newest version of every block that a rank owns.

    Args:
        host: The memory.
        rank: Which rank.
        world_size: The number of ranks.
        bound: Bytes that this rank may take; ``None`` for what there is.

    Attributes:
        is_hollow: Whether somebody has removed files, and no full save has followed.
        loss: Where that happened, if ever.

    """

    def __init__(self, host: HostMemory, rank: int, world_size: int, bound: int | None) -> None:
        super().__init__(host.path, None, rank, world_size, Tier.MEMORY, NEWEST_ONLY)
        self.is_hollow = False
        self.loss: Path | None = None
        self._host = host
        self._bound = bound
        self._lost: set[str] = set()

    @override
    def look_around(self, others: bool = False) -> None:
        super().look_around(others)
        with suppress(OSError):
            if lost := self.forget_vanished(self.folder):
                self.is_hollow, self.loss = True, self._host.path
                self._lost |= lost

    def take_lost(self) -> set[str]:
        """The keys of the blocks that somebody has removed since the last call."""
        lost, self._lost = self._lost, set()
        return lost

    @override
    def _depends_on_others(self, head: Head) -> bool:
        # Memory begins anew with every start, and nobody else's blocks lie here.
        return False

    @override
    def commit(self, head: Head, sections: Sequence[Section], refreshes: Sequence[Refresh] = ()) -> int:
        self._host.renew()
        if self._bound is not None:
            self.limit = max(0, self._bound - self._host.inherited_bytes(self.folder))
        return super().commit(head, sections, refreshes)
