"""The end of a save: the writer's thread turns what was staged into a delta."""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from io import BytesIO
from queue import SimpleQueue

import torch

from lightning_scar.core.memory import is_finite
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.save import Part, Save
from lightning_scar.core.skeletons import skeleton_key
from lightning_scar.core.stats import Stats
from lightning_scar.storage.delta import WHOLE, Column, Section, StorageError, checksum
from lightning_scar.storage.head import Head, Mark, Version
from lightning_scar.storage.rank_store import RankStore


class Committer:
    """Commits the saves of one rank in one start of the training.

    Args:
        store: The store to write to.
        stats: Counts failures and bytes.
        ranks: The ranks that save together.
        incarnation: The number of this start.

    Attributes:
        unwritten: Blocks that were staged but are not on disk: the save, and their keys. The training thread reads this
            queue.
        negative: Whether the first copy of a slot held negative values, by the names of group and slot.

    """

    def __init__(self, store: RankStore, stats: Stats, ranks: Ranks, incarnation: int) -> None:
        self.unwritten: SimpleQueue[tuple[Version, set[str]]] = SimpleQueue()
        self.negative: dict[tuple[str, str], bool] = {}
        self.skeleton_key = skeleton_key(ranks.rank)
        self._store = store
        self._stats = stats
        self._ranks = ranks
        self._incarnation = incarnation
        self._promised: Mark | None = None
        #: Blocks without a version on disk, because the save with them failed.
        self._missing: set[str] = set()
        self.go_on_from(())

    def go_on_from(self, lineage: Sequence[int]) -> None:
        """Continue the saves of earlier starts; without any, start fresh.

        Args:
            lineage: The incarnations of those starts.

        """
        self._lineage = (*lineage, self._incarnation)
        # A fresh start has no versions until its first save is durable. Those of an older training do not count.
        self._store.count(self._lineage)

    def is_stored(self, key: str, slots: set[str] | None = None) -> bool:
        """Return whether some version of a block is on disk, with exactly these slots if given."""
        stored = self._store.index.newest(key)
        return stored is not None and (slots is None or stored.slots.keys() == slots)

    def commit(self, save: Save, state_bytes: int) -> None:
        """Write the delta of a save.

        Args:
            save: The staged save.
            state_bytes: Bytes of this rank's share of the state.

        Raises:
            StorageError: If blocks would be missing.
            OSError: If it cannot be written.

        """
        save.queue.wait(save.copied)
        # The other ranks matter only for whether they have finished the full save, too.
        self._store.look_around(others=self._promised is not None)
        bad = {part.group.name: set(self._bad(part)) for part in save.parts}
        left_out = {part.group.key(number) for part in save.parts for number in bad[part.group.name]}
        groups = {part.group.key(number): part.group for part in save.parts for number in part.exact}
        exact = groups.keys() - left_out
        self._stats.non_finite_blocks += len(left_out)
        is_complete = save.full and not save.non_finite and not left_out
        promised = self._promise(save.version.mark if is_complete else None)
        try:
            if self._missing - exact:
                raise StorageError("an earlier save failed, and without its blocks this one would be incomplete")
            sections = [part.section(save.version, bad[part.group.name]) for part in save.parts]
            refreshes = [part.refresh() for part in save.parts]
            self._store.commit(
                self._head(save, is_complete, promised, state_bytes),
                [*filter(None, sections), self._skeleton(save)],
                [*filter(None, refreshes)],
            )
        except Exception:
            self._stats.failed_saves += 1
            slots = {key: {slot.name for slot in groups[key].slots} for key in exact}
            self._missing |= {key for key in exact if not self.is_stored(key, slots[key])}
            self.unwritten.put((save.version, exact | left_out))
            raise
        self._missing -= exact
        self._promised = promised
        if left_out:
            self.unwritten.put((save.version, left_out))
        self._stats.memory_bytes = self._store.memory_bytes
        self._stats.unreplicated_saves = self._store.chain.behind if self._store.chain is not None else 0

    def _bad(self, part: Part) -> Iterator[int]:
        """Yield the blocks whose optimizer state holds NaN or Inf and that have a good version on disk.

        This is checked in the writer's thread, so training does not wait. Scoring has checked the parameters.
        """
        if not part.exact:
            return
        for slot, rows in zip(part.group.slots[1:], part.rows[1:], strict=True):
            place = part.group.name, slot.name
            if place not in self.negative and rows.numel() and slot.dtype.is_floating_point:
                self.negative[place] = bool((rows.view(slot.dtype) < 0).any())
        if all(
            is_finite(rows.view(slot.dtype)) for slot, rows in zip(part.group.slots[1:], part.rows[1:], strict=True)
        ):
            return
        for number, copies in part.blocks():
            state = list(copies.items())[1:]
            if not all(is_finite(copy.view(slot.dtype)) for slot, copy in state) and self.is_stored(
                part.group.key(number)
            ):
                yield number

    def _skeleton(self, save: Save) -> Section:
        columns = {"bytes": _bytes(save.skeleton)}
        if save.small:
            buffer = BytesIO()
            torch.save(save.small, buffer)
            columns["small"] = _bytes(buffer.getbuffer())
        return Section(self.skeleton_key, [WHOLE], [save.version], columns)

    def _promise(self, finished: Mark | None) -> Mark | None:
        """Return the full save to keep, besides the newest that all ranks have finished, until all have finished it.

        A promise is kept even if this rank finishes a later full save, because the others may drop the older one for it
        at any time. It ends when another rank has continued without that save.
        """
        index, mark = self._store.index, self._promised
        if mark is None or (index.consistent is not None and mark <= index.consistent):
            return finished
        others = [head for rank, head in index.heads.items() if rank != self._ranks.rank]
        is_hopeless = any(Mark(o.incarnation, o.step) > mark and mark not in o.consistent for o in others)
        return finished if is_hopeless else mark

    def _head(self, save: Save, is_complete: bool, promised: Mark | None, state_bytes: int) -> Head:
        marks = {self._store.index.consistent, promised}
        known = {
            "oldest_age": save.oldest_age,
            "distance": _finite(save.distance),
            "distance_of_bases": _finite(save.squared_bases**0.5),
            "motion": [_finite(value) for value in astuple(save.motion)],
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
            state_bytes=state_bytes + save.skeleton.nbytes,
            info={**save.info, **known},
        )


def _bytes(data: memoryview) -> Column:
    return Column("U8", (), data.nbytes, [checksum(data)], lambda: [data])


def _finite(value: float) -> float:
    # JSON has no infinity.
    return value if math.isfinite(value) else sys.float_info.max
