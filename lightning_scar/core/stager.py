"""Copies a save from live tensors to host memory alongside the training: measures, encodes, chooses, gathers."""

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_scar.core.bases import NEVER, Base, Bases
from lightning_scar.core.blocks import BlockMap
from lightning_scar.core.codec import Codec
from lightning_scar.core.devices import HostBuffer, on_host, queue_of
from lightning_scar.core.passes import CodeMemory, Pass, plan_passes, provide_codes
from lightning_scar.core.preconditioner import preconditioners
from lightning_scar.core.refresh import ALWAYS_EXACT, plan
from lightning_scar.core.rework import motion
from lightning_scar.core.rows import gather
from lightning_scar.core.save import Part, Save
from lightning_scar.core.scoring import Scores, careful, score
from lightning_scar.core.selection import Candidates, select
from lightning_scar.core.settings import Settings
from lightning_scar.core.threads import pool


class _Form(NamedTuple):
    """What the passes of a save depend on: the map, which groups have bases, and which slots have signs."""

    map: BlockMap
    moving: list[bool]
    negative: dict[tuple[str, str], bool]

    def is_like(self, other: "_Form") -> bool:
        # An equal map may be of tensors on another device.
        return self.map is other.map and self[1:] == other[1:]


class Stager:
    """Stages saves.

    Lazy staging reads live tensors during the forward and backward pass. Tensors that may change meanwhile are copied
    at once on their device: buffers, callback state, groups with blocks that were never saved, and tensors whose
    version counter once changed during staging.

    Args:
        settings: What to save and how.
        negative: Whether a slot has held negative values, by the names of group and slot. If one is missing, it is not
            known yet, and the slot is not refreshed.

    Attributes:
        bases: The bases of the blocks.

    """

    def __init__(self, settings: Settings, negative: dict[tuple[str, str], bool]) -> None:
        self.bases = Bases()
        self._negative = negative
        self._settings = settings
        self._caught: set[str] = set()
        #: Bytes that the last saves left unused, for a block that is larger than the budget of one save.
        self._saved_up = 0
        self._counters: dict[str, list[int]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._staging: Future[None] | None = None
        #: The passes of the last partial save, and what they depend on.
        self._planned: tuple[_Form, list[Pass]] | None = None

    def start(self, save: Save) -> bool:
        """Copy what cannot wait, and stage the rest in a thread.

        The thread uses one core: in small operations, several cores mostly wait for each other.

        Returns:
            Whether training may continue meanwhile; else :meth:`finish` must follow at once.

        """
        tensors = [tensor for part in save.parts for tensor in part.live]
        save.queue, save.buffer.pinned = queue_of(tensors), any(tensor.device.type != "cpu" for tensor in tensors)
        is_lazy = not save.full and self._settings.staging == "lazy"
        unsaved = self._unsaved() if is_lazy else set()
        for part in save.parts:
            if is_lazy and (not part.group.lazy or part.group.name in self._caught | unsaved):
                part.live = [tensor.clone() for tensor in part.live]
        self._counters = {part.group.name: _counters(part) for part in save.parts}
        if self._thread is None:
            self._thread = pool(1, "scar-stager")
        self._staging = self._thread.submit(self._stage, save, save.queue.mark())
        return is_lazy

    @property
    def is_at_work(self) -> bool:
        """Whether a save is being staged and staging has not failed, so that it can be finished."""
        staging = self._staging
        return staging is not None and not (staging.done() and staging.exception() is not None)

    def finish(self, save: Save) -> None:
        """Let nothing change before it is copied, and drop the copies of tensors that changed nevertheless."""
        if self._staging is not None:
            self._staging.result()
            self._staging = None
        save.queue.hold(save.copied)
        torn = [part for part in save.parts if _counters(part) != self._counters[part.group.name]]
        # A tensor that changed outside of optimizer steps will do so again: from now on, copy it at once.
        self._caught |= {part.group.name for part in torn}
        for part in torn:
            self.bases.fail(self._numbers(part))
            part.exact, part.refreshed = [], []

    def call_off(self, save: Save) -> None:
        """Record that a save will not be written."""
        self._staging = None
        chosen = save.chosen.nonzero().flatten()
        self.bases.fail(chosen)
        self.bases.forget(chosen[save.never[chosen]])

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _unsaved(self) -> set[str]:
        """Return the groups with blocks that were never saved: the copies of these must not be dropped."""
        missing = (self.bases.steps == NEVER).nonzero().flatten().tolist()
        return {self.bases.map.groups[self.bases.map.locate(block)[0]].name for block in missing}

    def _numbers(self, part: Part) -> Tensor:
        """Return the numbers in the map of the part's exact blocks."""
        return torch.tensor(part.exact, dtype=torch.int64, device="cpu") + self.bases.map.numbers[part.group.key(0)]

    # -- one save, step by step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def _stage(self, save: Save, ready: object) -> None:
        scores = self._score(save, ready)
        self._choose(save, scores)
        self._gather(save, scores, ready)
        self.bases.record(save.chosen.nonzero().flatten(), save.version)

    def _score(self, save: Save, ready: object) -> Scores:
        """Compare every group with its base and encode its refresh."""
        found: list[Tensor] = []

        def work() -> None:
            seen = score(self.bases.map, parts, passes, codes, save.version.step)
            found[:] = on_host([*seen, *(values for _, values in save.small)])

        parts = [(part, self.bases.base(part.group)) for part in save.parts]
        passes, codes = self._plan(save, parts)
        save.queue.wait(save.queue.beside(work, ready))
        count = len(found) - len(save.small)
        save.small = list(zip((paths for paths, _ in save.small), found[count:], strict=True))
        scores = Scores.of(found[:count])
        self._look_again(save, scores, ready)
        return scores

    def _plan(self, save: Save, parts: Sequence[tuple[Part, Base]]) -> tuple[list[Pass], list[CodeMemory | None]]:
        """Plan the passes of a save, and reserve memory for all that a partial one copies."""
        block_map = self.bases.map
        if save.full:
            passes = plan_passes(block_map, parts, {}, full=True)
            return passes, [None] * len(passes)
        moving = [base.values is not None for _, base in parts]
        # A copy: the writer's thread adds to it.
        form = _Form(block_map, moving, dict(self._negative))
        if self._planned is None or not self._planned[0].is_like(form):
            codecs: dict[str, dict[str, Codec]] = {}
            if self._settings.refresh is not None:
                groups = [part.group for part, moves in zip(save.parts, moving, strict=True) if moves]
                codecs = plan(groups, block_map.state_bytes, form.negative, self._settings.fraction)
            self._planned = form, plan_passes(block_map, parts, codecs)
        passes, pieces = self._planned[1], 3 * sum(len(part.group.slots) for part in save.parts)
        save.buffer.reserve(int(self._settings.fraction * block_map.state_bytes) + pieces * HostBuffer.ALIGNMENT)
        return passes, provide_codes(passes, save.parts, save.buffer)

    def _look_again(self, save: Save, scores: Scores, ready: object) -> None:
        """Settle what the fast way cannot: distances of blocks with NaN or Inf, and slots whose sign has changed."""
        bases, block_map = self.bases, self.bases.map
        unclear = (scores.distance.isnan() & (bases.steps != NEVER)).nonzero().flatten().tolist()
        places = [(save.parts[g], number) for g, number in map(block_map.locate, unclear)]
        doubtful = [
            (part.group.name, slot.name, tensor)
            for part, unfit in zip(save.parts, block_map.by_group(scores.unfit.nonzero().flatten()), strict=True)
            if unfit
            for slot, tensor in zip(part.group.slots, part.live, strict=True)
            if slot.name in part.codes and part.codes[slot.name].codec.kind == "log"
        ]
        if not (unclear or doubtful):
            return
        found: list[Tensor] = []

        def work() -> None:
            distances = [careful(part.group, i, part.live[0], bases.values(part.group)) for part, i in places]
            found[:] = on_host([*distances, *((tensor < 0).any() for _, _, tensor in doubtful)])

        save.queue.wait(save.queue.beside(work, ready))
        for block, distance in zip(unclear, found, strict=False):
            scores.distance[block] = distance
        for (group, slot, _), is_negative in zip(doubtful, found[len(unclear) :], strict=True):
            # In this save, these blocks get no refresh.
            self._negative[group, slot] = bool(is_negative)

    def _choose(self, save: Save, scores: Scores) -> None:
        """Choose the blocks to write exactly, and those to refresh."""
        bases, block_map = self.bases, self.bases.map
        for g, part in enumerate(save.parts):
            # A frozen tensor has changed nevertheless.
            if (
                part.group.frozen
                and bases.values(part.group) is None
                and scores.distance[bases.blocks(g)].isinf().any()
            ):
                bases.thaw(g, part.live[0])
        never = bases.steps == NEVER
        scores.distance[bases.due & ~scores.distance.isnan()] = math.inf
        non_finite = scores.distance.isnan() & ~never
        eligible = ~(never | non_finite | self._unmoved(save, scores))
        age = save.version.step - bases.steps
        preconditioner = preconditioners(block_map.groups, scores.squares)
        candidates = Candidates(scores.distance, block_map.nbytes, age, save.version.step, preconditioner)
        chosen = never | eligible if save.full else never | self._selected(save, candidates, eligible)
        refreshed = self._refreshed(save, scores) & ~chosen & ~non_finite
        rest = eligible & ~chosen
        lag = torch.where(refreshed, scores.error, scores.distance)
        save.chosen, save.never, save.non_finite = chosen, never, int(non_finite.sum())
        is_finite = rest & scores.distance.isfinite()
        save.squared_rest = float(lag[is_finite].square().sum())
        save.squared_bases = float(scores.distance[is_finite].square().sum())
        save.oldest_age = int(age[rest].max()) if bool(rest.any()) else 0
        root = preconditioner.sqrt()
        save.motion = motion(scores.distance * root, lag * root, age.masked_fill(never, 0), rest)
        numbers = refreshed.nonzero().flatten()
        tables = torch.cat([block_map.spans, torch.stack([bases.incarnations, bases.sequences], 1)], 1)[numbers]
        places = block_map.by_group(chosen.nonzero().flatten()), block_map.by_group(numbers)
        for part, exact, others, table in zip(
            save.parts, *places, torch.split(tables, [*map(len, places[1])]), strict=True
        ):
            part.exact, part.refreshed, part.table = exact, others, table

    def _unmoved(self, save: Save, scores: Scores) -> Tensor:
        """Return the blocks that are on disk as they are now.

        Distance 0 is enough for frozen tensors, and without optimizer state. Otherwise the state may change while the
        parameter does not (a warm-up from learning rate 0). Minus zero equals zero, so saves of everything skip only
        frozen tensors.
        """
        resting, is_all = scores.distance == 0, save.full or self._settings.fraction == 1
        for g, part in enumerate(save.parts):
            if not part.group.frozen and (is_all or len(part.group.slots) > 1):
                resting[self.bases.blocks(g)] = False
        return resting

    def _selected(self, save: Save, candidates: Candidates, eligible: Tensor) -> Tensor:
        """Return the blocks of highest priority, as many as the budget allows."""
        sizes = candidates.nbytes
        whole = int(self._settings.fraction * int(sizes.sum()))
        total = whole - sum(part.code_bytes for part in save.parts)
        # Running statistics and other buffers are small in bytes and distance, but important: if they fit in a quarter
        # of the budget, write them always.
        restless = self._of_blocks([not part.group.lazy for part in save.parts])
        chosen = torch.zeros_like(eligible)
        own = int(sizes[restless].sum())
        first = own if own <= whole * ALWAYS_EXACT else max(int(own * self._settings.fraction), total // 4)
        for among, budget in ((restless, first), (~restless, total)):
            numbers = (eligible & among).nonzero().flatten()
            if not len(numbers):
                continue
            left, largest = budget - int(sizes[chosen].sum()), int(sizes[numbers].max())
            # A block larger than the budget must not wait forever. With a refresh, it can wait until it fits.
            has_refresh = any(part.codes for part in save.parts) and not bool(self.bases.due[numbers].any())
            is_patient = has_refresh and among is not restless
            found = self._best(candidates.of(numbers), left if is_patient else max(left, largest), is_patient)
            if is_patient and not len(found):
                self._saved_up = min(self._saved_up + max(left, 0), largest)
                found = self._best(candidates.of(numbers), self._saved_up, patient=True)
                self._saved_up -= int(sizes[numbers[found]].sum())
            chosen[numbers[found]] = True
        return chosen

    def _best(self, candidates: Candidates, budget: int, patient: bool) -> Tensor:
        return select(candidates, self._settings.policy_function, budget, self._settings.max_age, patient)

    def _refreshed(self, save: Save, scores: Scores) -> Tensor:
        """Return the blocks to refresh: all that can be encoded.

        Include unmoved blocks: an older refresh on disk may hold values that they had in between.
        """
        coded = self._of_blocks([bool(part.codes) for part in save.parts])
        return coded & (scores.unfit == 0) & self.bases.is_known()

    def _of_blocks(self, of_groups: list[bool]) -> Tensor:
        """Expand flags of groups to their blocks."""
        sizes = torch.tensor(self.bases.map.offsets, dtype=torch.int64, device="cpu").diff()
        return torch.tensor(of_groups, dtype=torch.bool, device="cpu").repeat_interleave(sizes)

    def _gather(self, save: Save, scores: Scores, ready: object) -> None:
        """Copy the chosen blocks to the host, and make them the new bases."""
        for part in save.parts:
            sizes = [slot.dtype.itemsize * part.group.row_numel for slot in part.group.slots]
            count = sum(stop - start for start, stop in map(part.group.span, part.exact))
            part.rows = [save.buffer.take(count * size) for size in sizes] if part.exact else []

        def work() -> None:
            for g, part in enumerate(save.parts):
                base = self.bases.values(part.group)
                slots = zip(part.group.slots, part.live, part.rows, strict=False)
                for i, (slot, live, into) in enumerate(slots):
                    gather(live, part.group, part.exact, into.view(slot.dtype), base if i == 0 else None)
                if part.group.frozen and (
                    len(part.exact) == len(part.group) or bool((scores.distance[self.bases.blocks(g)] == 0).all())
                ):
                    self.bases.freeze(g, part.live[0])

        save.copied = save.queue.beside(work, ready)


def _counters(part: Part) -> list[int]:
    return [tensor._version for tensor in part.live]
