"""The end of a save: what was staged becomes a delta, in the writer's thread."""

import math
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch

from lightning_scar.core.ranks import Ranks
from lightning_scar.core.skeletons import skeleton_key
from lightning_scar.core.stager import Stager, Staging
from lightning_scar.core.staging import payload
from lightning_scar.core.stats import Stats
from lightning_scar.storage.delta import BlockData, StorageError
from lightning_scar.storage.head import Head, Mark, Version
from lightning_scar.storage.tiered_rank_store import TieredRankStore


@dataclass
class Save:
    """One save on its way from the checkpoint dict to the disk."""

    version: Version
    skeleton: memoryview
    staging: Staging
    info: dict[str, Any] = field(default_factory=dict)
    is_staged: bool = False
    stall: float = 0.0


class Committer:
    """Commits the saves of one rank, in one start of the training.

    Args:
        store: Where to.
        stager: Remembers which copies did not reach the disk.
        stats: Where failures and bytes are counted.
        ranks: Who saves.
        incarnation: The number of this start.

    """

    def __init__(self, store: TieredRankStore, stager: Stager, stats: Stats, ranks: Ranks, incarnation: int) -> None:
        self._store = store
        self._stager = stager
        self._stats = stats
        self._ranks = ranks
        self._incarnation = incarnation
        self._promised: Mark | None = None
        self.skeleton_key = skeleton_key(ranks.rank)
        self._begin(())

    def go_on_from(self, lineage: Sequence[int]) -> None:
        """Continues what earlier starts saved, instead of beginning anew.

        Args:
            lineage: Their numbers.

        """
        self._begin(lineage)

    def _begin(self, lineage: Sequence[int]) -> None:
        self._lineage = (*lineage, self._incarnation)
        # A fresh start has no versions until its first save is durable: an older training's do not count for it.
        self._store.count(self._lineage)

    def is_stored(self, key: str) -> bool:
        """Whether some version of a block is on disk, with all the slots that it has now."""
        block_map, stored = self._stager.last.map, self._store.index.newest(key)
        if key not in block_map.numbers:
            return True  # Nobody will ask for it.
        group = block_map.groups[block_map.locate(block_map.numbers[key])[0]]
        return stored is not None and set(stored.slots) == {slot.name for slot in group.slots}

    def commit(self, save: Save) -> None:
        """Writes the delta of a save.

        Raises:
            StorageError: If it would leave holes.
            OSError: If it cannot be written.

        """
        self._store.look_around()
        # What somebody has removed from memory is not saved any more.
        self._stager.fail(self._store.take_lost() & self._stager.last.map.numbers.keys(), save.version.step)
        blocks = [block for staged in save.staging.groups for block in staged.blocks()]
        # Of the parameters it is known; optimizer state is looked at here, where nobody waits.
        bad = {block.key for block in blocks if not block.state_is_finite and self.is_stored(block.key)}
        keys = {block.key for block in blocks}
        self._stager.fail(bad, save.version.step)
        self._stats.non_finite_blocks += len(bad)
        is_complete = save.staging.full and not save.staging.non_finite and not bad
        promised = self._promise(save.version.mark if is_complete else None)
        try:
            if not all(self.is_stored(key) for key in set(self._stager.failed) - keys):
                raise StorageError("an earlier save failed, without whose blocks this one would have holes")
            data = [block.data(save.version) for block in blocks if block.key not in bad]
            skeleton = torch.frombuffer(save.skeleton, dtype=torch.uint8)
            slots = {"bytes": payload(skeleton, torch.uint8, skeleton.shape)}
            data.append(BlockData(self.skeleton_key, save.version, slots))
            self._store.commit(self._head(save, is_complete, promised), data)
        except Exception:
            self._stats.failed_saves += 1
            self._stager.fail(keys, save.version.step)
            raise
        self._stats.memory_bytes = self._store.memory_bytes
        self._stats.unreplicated_saves = self._store.chain.behind if self._store.chain is not None else 0
        self._promised = promised
        self._stager.succeed(keys - bad, save.version.step)

    def _promise(self, finished: Mark | None) -> Mark | None:
        """The full save that this rank keeps besides the newest that all have finished, until they have this one, too.

        Once said it is kept, even if a later one is finished meanwhile: the others may give up the older one for it at
        any time. It is given up when one of them has gone on without it.
        """
        index, mark = self._store.index, self._promised
        if mark is None or (index.consistent is not None and mark <= index.consistent):
            return finished
        others = [head for rank, head in index.heads.items() if rank != self._ranks.rank]
        is_hopeless = any(Mark(o.incarnation, o.step) > mark and mark not in o.consistent for o in others)
        return finished if is_hopeless else mark

    def _head(self, save: Save, is_complete: bool, promised: Mark | None) -> Head:
        marks = {self._store.index.consistent, promised}
        staging = save.staging
        known = {
            "oldest_age": staging.oldest_age,
            "distance": _finite(staging.distance),
            "motion": [_finite(value) for value in astuple(staging.motion)],
        }
        return Head(
            incarnation=self._incarnation,
            lineage=self._lineage,
            sequence=save.version.sequence,
            step=save.version.step,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            kind="full" if is_complete else "partial",
            whole=self._store.is_whole,
            consistent=tuple(sorted(mark for mark in marks if mark is not None)),
            state_bytes=self._stager.last.map.state_bytes + save.skeleton.nbytes,
            info={**save.info, **known},
        )


def _finite(value: float) -> float:
    # JSON has no infinity.
    return value if math.isfinite(value) else sys.float_info.max
