"""Scores, chooses and copies blocks: at once, or beside the next forward and backward."""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_scar.core.blocks import BlockMap
from lightning_scar.core.last_saved import NEVER, LastSaved
from lightning_scar.core.rework import Motion
from lightning_scar.core.scoring import Choice, Scorer
from lightning_scar.core.settings import Settings
from lightning_scar.core.staging import StagedGroup, StagingBuffer, stage
from lightning_scar.core.threads import Run, in_turn, team
from lightning_scar.storage.store import Store


@dataclass
class Staging:
    """What one save copies.

    Attributes:
        step: The optimizer step.
        full: Whether to take every block that has changed.
        live: The live tensors of every group, one a slot, as rows.
        buffer: Where the copies go.
        choices: What was chosen.
        groups: The copies.

    """

    step: int
    full: bool
    live: list[list[Tensor]]
    buffer: StagingBuffer
    choices: list[Choice] = field(default_factory=list)
    groups: list[StagedGroup] = field(default_factory=list)
    tensor_versions: dict[int, list[int]] = field(default_factory=dict)
    lazily: "Future[None] | None" = None

    @property
    def non_finite(self) -> int:
        """Blocks left out because their parameter holds NaN or Inf."""
        return sum(choice.non_finite for choice in self.choices)

    @property
    def distance(self) -> float:
        """L2 distance between the live state and the running checkpoint, once this save is in it."""
        return float(sum(choice.squared_rest for choice in self.choices) ** 0.5)

    @property
    def motion(self) -> Motion:
        """How fast the blocks move, and what of that the running checkpoint lags behind."""
        return sum((choice.motion for choice in self.choices), Motion())

    @property
    def oldest_age(self) -> int:
        """Steps since the oldest block left out, of those that have changed, was saved."""
        return max((choice.oldest_age for choice in self.choices), default=0)


class Stager:
    """Fills stagings.

    Lazy staging reads live tensors beside the forward and backward pass. What may change there is copied at once:
    buffers and callback state, and every tensor that was once caught changing by its version counter.

    Args:
        settings: What to save and how.
        store: Knows what is on disk.

    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self.last = LastSaved()
        #: Blocks whose last copy did not reach the disk, and the step of that copy.
        self.failed: dict[str, int] = {}
        self._settings = settings
        self._scorer = Scorer(settings, store)
        self._caught: set[str] = set()
        self._thread: ThreadPoolExecutor | None = None
        self._recording: Future[None] | None = None

    def start(self, staging: Staging) -> None:
        """Copies what cannot wait; the rest is on its way when this returns."""
        self._recorded()
        lazy = self._lazy_groups(staging)
        staging.tensor_versions = {g: _versions(staging.live[g]) for g in lazy}
        eager = [g for g in range(len(staging.live)) if g not in lazy]
        with team(torch.get_num_threads()) as run:
            spent = self._copy(staging, eager, self._budget(staging, eager), run)
        if self._thread is None:
            self._thread = _one_thread()
        # The copies themselves tell what was saved last; nobody need wait for that either.
        self._recording = self._thread.submit(self._record, staging, list(staging.groups))
        if lazy:
            rest = int(self._settings.fraction * self.last.map.state_bytes) - spent
            staging.lazily = self._thread.submit(self._copy_and_record, staging, lazy, rest)

    def finish(self, staging: Staging) -> None:
        """Waits for the copies, and drops those of tensors that changed meanwhile."""
        if staging.lazily is None:
            return
        staging.lazily.result()
        changed = [g for g, versions in staging.tensor_versions.items() if _versions(staging.live[g]) != versions]
        if changed:
            torn = {self.last.map.groups[g].name for g in changed}
            # What changed outside the optimizer will do so again: from now on it is copied at once.
            self._caught |= torn
            dropped = [staged for staged in staging.groups if staged.group.name in torn]
            self.fail((staged.group.key(number) for staged in dropped for number in staged.numbers), staging.step)
            staging.groups = [staged for staged in staging.groups if staged.group.name not in torn]

    def fit(self, block_map: BlockMap, live: Sequence[Sequence[Tensor]]) -> None:
        """Follows a change of the state; see :meth:`LastSaved.fit`."""
        if block_map is not self.last.map:
            self._recorded()
            self.last.fit(block_map, live)

    def forget(self, keys: Iterable[str]) -> None:
        """Makes blocks count as never saved."""
        self._recorded()
        self.last.forget(keys)

    def fail(self, keys: Iterable[str], step: int) -> None:
        """Notes that the copies of one step did not reach the disk."""
        self.failed |= dict.fromkeys(keys, step)

    def succeed(self, keys: Iterable[str], step: int) -> None:
        """Notes that the copies of one step are on disk; a later copy may have failed meanwhile."""
        for key in keys:
            if self.failed.get(key, step) <= step:
                self.failed.pop(key, None)

    def close(self) -> None:
        """Ends the thread."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _lazy_groups(self, staging: Staging) -> list[int]:
        if staging.full or self._settings.staging == "eager":
            return []
        # A block without a version on disk must not be dropped, so it must not be torn.
        unsaved = {self.last.map.locate(block)[0] for block in (self.last.steps == NEVER).nonzero().flatten().tolist()}
        return [
            g
            for g, group in enumerate(self.last.map.groups)
            if group.lazy
            and group.name not in self._caught
            and g not in unsaved
            and all(tensor.device.type == "cpu" for tensor in staging.live[g])
        ]

    def _budget(self, staging: Staging, eager: Sequence[int]) -> int | None:
        """The share of the budget for what is copied at once; ``None`` for a full save."""
        if staging.full:
            return None
        block_map = self.last.map
        total = int(self._settings.fraction * block_map.state_bytes)
        if len(eager) == len(block_map.groups):
            return total
        own = sum(group.rows * group.row_nbytes for group in (block_map.groups[g] for g in eager))
        # Running statistics and other buffers are small in bytes and in distance, and matter all the same: where they
        # fit in a quarter of the budget they are always fresh.
        return max(int(own * self._settings.fraction), min(own, total // 4))

    def _copy(self, staging: Staging, groups: Sequence[int], budget: int | None, run: Run = in_turn) -> int:
        """Scores groups, chooses among their blocks and copies those; returns the bytes spent."""
        if not groups:
            return 0
        block_map = self.last.map
        choice = self._scorer.choose(self.last, staging.live, groups, staging.step, budget, set(self.failed), run)
        staging.choices.append(choice)
        staging.buffer.reserve(choice.nbytes, sum(len(group.slots) for group in block_map.groups))
        chosen = [(block_map.groups[g], staging.live[g], numbers) for g, numbers in choice.by_group(block_map).items()]
        staging.groups += stage(staging.buffer, chosen, run)
        return choice.nbytes

    def _recorded(self) -> None:
        if self._recording is not None:
            self._recording.result()

    def _record(self, staging: Staging, groups: Sequence[StagedGroup]) -> None:
        for staged in groups:
            self.last.record(staged, staging.step)

    def _copy_and_record(self, staging: Staging, lazy: Sequence[int], budget: int) -> None:
        done = len(staging.groups)
        self._copy(staging, lazy, budget)
        self._record(staging, staging.groups[done:])


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors]


def _one_thread() -> ThreadPoolExecutor:
    """A thread whose torch operations use one core, so that it does not fight with the training for all of them."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, "scar-stager", initializer=torch.set_num_threads, initargs=(1,))
    pool.submit(int).result()
    # The number holds for the thread that set it, but is also what later threads begin with.
    torch.set_num_threads(threads)
    return pool
