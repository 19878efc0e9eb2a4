"""The end of a save: what was staged becomes a delta, in the writer's thread."""

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
    """Commits the saves of one rank, in one start of the training.

    Args:
        store: Where to.
        stats: Where failures and bytes are counted.
        ranks: Who saves.
        incarnation: The number of this start.

    Attributes:
        unwritten: What is not on disk although it was staged: the keys of blocks, and the save that they were staged
            for. The training thread takes it from here.
        negative: For each slot of a group, by name, whether its first copy held negative values.

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
        #: Blocks of which no version is on disk, since the save that had them failed.
        self._missing: set[str] = set()
        self.go_on_from(())

    def go_on_from(self, lineage: Sequence[int]) -> None:
        """Continues what earlier starts saved; begins anew if there are none.

        Args:
            lineage: Their numbers.

        """
        self._lineage = (*lineage, self._incarnation)
        # A fresh start has no versions until its first save is durable: an older training's do not count for it.
        self._store.count(self._lineage)

    def is_stored(self, key: str, slots: set[str] | None = None) -> bool:
        """Whether some version of a block is on disk, with all these slots."""
        stored = self._store.index.newest(key)
        return stored is not None and (slots is None or stored.slots.keys() == slots)

    def commit(self, save: Save, state_bytes: int) -> None:
        """Writes the delta of a save.

        Args:
            save: What was staged.
            state_bytes: Bytes of this rank's share of the state.

        Raises:
            StorageError: If it would leave holes.
            OSError: If it cannot be written.

        """
        save.queue.wait(save.copied)
        # Of the others it matters only whether they have finished a full save, too.
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
                raise StorageError("an earlier save failed, without whose blocks this one would have holes")
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
        """The blocks whose optimizer state holds NaN or Inf, and that have a good version.

        It is looked at here, where nobody waits. Of the parameter itself its distance has told.
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
