"""One failure, and what every strategy makes of it."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import fsspec
import torch

from benchmarks.paper.strategies import LOST, PERIOD, STRATEGIES, Strategy
from benchmarks.paper.training import Training
from benchmarks.rework import first_below
from lightning_scar.core.live_state import Dissection, LiveState
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings

#: The first save, a full one, comes after this iteration: optimizer state is there by then.
_FIRST = 1
#: A recovered training that has not come back after so many times the undisturbed one's iterations is given up.
_PATIENCE = 3
#: How many iterations before the undisturbed training's convergence a recovered one is first looked at: that it would
#: be so much faster is not to be expected, and on some tasks a loss costs more than an iteration.
_EARLY = 5


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        name: What to call it.
        start: Begins a training, from a seed.
        iterations: The undisturbed training's loss after so many of them is the threshold.
        block_size: Bytes of a block, before rows are kept whole.

    """

    name: str
    start: Callable[[int], Training]
    iterations: int
    block_size: int


@dataclass(frozen=True)
class Outcome:
    """A recovery.

    Attributes:
        strategy: How the state had been saved.
        lost: The share of the blocks that were lost.
        rework_cost: Iterations to the threshold, less those of the undisturbed training.
        squared_distance: Of the parameters before the failure to those after the recovery.
        is_back: Whether the threshold was reached at all.

    """

    strategy: str
    lost: float
    rework_cost: float
    squared_distance: float
    is_back: bool


@dataclass(frozen=True)
class Trial:
    """One failure.

    Attributes:
        seed: Of the training and of the failure.
        converged: Iterations of the undisturbed training to the threshold, interpolated.
        failed: The iteration after which the failure came.
        saves: How often each strategy had saved.
        nbytes: What it had written in partial and full saves after the first.
        outcomes: Of every strategy with every share of lost blocks.

    """

    seed: int
    converged: float
    failed: int
    saves: dict[str, int]
    nbytes: dict[str, int]
    outcomes: list[Outcome]


def run(task: Task, seed: int, strategies: Sequence[Strategy] = STRATEGIES) -> Trial:
    """Trains undisturbed, then again up to a failure, and on from there after each recovery."""
    losses = descent(task.start(seed), task.iterations)
    converged = first_below(losses, losses[-1])
    chance = torch.Generator().manual_seed(seed)
    # Before the first period is over strategies hardly differ in what they have saved.
    failed = geometric(PERIOD, math.ceil(converged) - 1, chance)
    training = task.start(seed)
    with ExitStack() as stack:
        runs = [(strategy, stack.enter_context(_running(task, seed, strategy))) for strategy in strategies]
        first_bytes = _train(training, runs, failed)
        failure = Failure(task, training, losses[-1], converged, chance)
        outcomes = [failure.recover(strategy, running, lost) for strategy, running in runs for lost in LOST]
        saves = {strategy.name: running.stats.saves for strategy, running in runs}
        nbytes = {
            strategy.name: running.stats.bytes_written - first
            for (strategy, running), first in zip(runs, first_bytes, strict=True)
        }
    return Trial(seed, converged, failed, saves, nbytes, outcomes)


class Failure:
    """A training that is about to lose blocks.

    Args:
        task: Its task.
        training: The training.
        threshold: The loss at which it counts as converged.
        converged: When the undisturbed one does.
        chance: Chooses the order in which blocks are lost.

    """

    def __init__(
        self,
        task: Task,
        training: Training,
        threshold: float,
        converged: float,
        chance: torch.Generator,
    ) -> None:
        self._task = task
        self._training = training
        self._threshold = threshold
        self._converged = converged
        keys = list(_taken_apart(training, task).map.numbers)
        self._order = [keys[i] for i in torch.randperm(len(keys), generator=chance).tolist()]

    def recover(self, strategy: Strategy, running: RunningCheckpoint, lost: float) -> Outcome:
        """What the rest of the training is like if a share of the blocks is lost and restored."""
        training = copy.deepcopy(self._training)
        _lose(_taken_apart(training, self._task), set(self._order[: max(1, round(lost * len(self._order)))]))
        running.heal(training.checkpoint(), optimizers=training.optimizers(), parameters=training.parameters())
        training.recovered()
        pairs = zip(training.parameters(), self._training.parameters(), strict=True)
        squared_distance = sum(float((here - there).detach().double().square().sum()) for here, there in pairs)
        while training.iteration < self._converged - _EARLY:
            training.step()
        looked_from = training.iteration
        rest = descent(training, self._task.iterations * _PATIENCE, self._threshold)
        needed = looked_from + first_below(rest, self._threshold)
        is_back = rest[-1] <= self._threshold
        return Outcome(strategy.name, lost, needed - self._converged, squared_distance, is_back)


def descent(training: Training, iterations: int, threshold: float = -math.inf) -> list[float]:
    """The losses of a training from now on, until it is down at a threshold or has made so many iterations."""
    losses = [training.loss()]
    while len(losses) <= iterations and losses[-1] > threshold:
        training.step()
        losses.append(training.loss())
    return losses


def geometric(first: int, last: int, chance: torch.Generator) -> int:
    """A whole number in a range, from a geometric distribution whose mean is the middle of it but for the range."""
    while True:
        drawn = first - 1 + int(torch.empty(1).geometric_(2 / (2 + last - first), generator=chance))
        if drawn <= last:
            return drawn


@contextmanager
def _running(task: Task, seed: int, strategy: Strategy) -> Iterator[RunningCheckpoint]:
    """A running checkpoint in memory, for as long as it is needed."""
    folder = f"/paper/{task.name}/{seed}/{strategy.name}"
    settings = Settings(strategy.fraction, strategy.policy, task.block_size, staging="eager", on_write_error="raise")
    with RunningCheckpoint(f"memory:/{folder}", settings) as running:
        yield running
    fsspec.filesystem("memory").rm(folder, recursive=True)


def _train(training: Training, runs: Sequence[tuple[Strategy, RunningCheckpoint]], iterations: int) -> list[int]:
    """Trains and saves in all ways at once; returns the bytes of their first saves."""
    first_bytes: list[int] = []
    for iteration in range(1, iterations + 1):
        training.step()
        for strategy, running in runs:
            if iteration == _FIRST or iteration % strategy.every == 0:
                state = training.checkpoint()
                running.save_now(state, iteration, optimizers=training.optimizers(), parameters=training.parameters())
                running.flush()
        if iteration == _FIRST:
            first_bytes = [running.stats.bytes_written for _, running in runs]
    return first_bytes


def _taken_apart(training: Training, task: Task) -> LiveState:
    dissection = Dissection(Ranks())
    return dissection.take_apart(training.checkpoint(), training.optimizers(), training.parameters(), task.block_size)


@torch.no_grad()
def _lose(state: LiveState, keys: set[str]) -> None:
    """Overwrites blocks with NaN, their optimizer rows too."""
    for group, tensors in zip(state.map.groups, state.of(state.map), strict=True):
        for i in range(len(group)):
            if group.key(i) in keys:
                for tensor in tensors:
                    tensor[slice(*group.span(i))] = torch.nan
