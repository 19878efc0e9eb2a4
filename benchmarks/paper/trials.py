"""One failure, and what every strategy makes of it."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import fsspec
import torch
from torch import Tensor

from benchmarks.paper.strategies import LOST, PERIOD, STRATEGIES, Strategy
from benchmarks.paper.training import Training, chance
from benchmarks.rework import first_below
from lightning_scar.core.live_state import Dissection, LiveState
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.save import Part
from lightning_scar.core.selection import Candidates, random
from lightning_scar.core.settings import Settings

#: The first save, a full one, comes after this iteration: optimizer state is there by then.
_FIRST = 1
#: A recovered training that has not come back after so many times the undisturbed one's iterations is given up.
_PATIENCE = 3
#: Iterations since the last full checkpoint, in an order whose beginnings are balanced, too.
_PLACES = (5, 2, 7, 0, 4, 3, 6, 1)
#: Numbers no iteration: the place of the failure's draws among those of a seed.
_FATE = 1_000_000
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
        is_refreshed: Whether its state has a meaning in low precision.

    """

    name: str
    start: Callable[[int], Training]
    iterations: int
    block_size: int
    is_refreshed: bool = True

    def suits(self, strategy: Strategy) -> bool:
        """Whether its state can be saved so."""
        return self.is_refreshed or strategy.refresh is None


@dataclass(frozen=True)
class Outcome:
    """A recovery: of the blocks that were lost, with their optimizer rows. What is no block stays (Adam's counters).

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
        saves: How often each strategy had saved, after the first time.
        nbytes: What it had written then, with headers, skeletons and merging.
        nominal: Bytes of exact blocks, codes and scales of a mean save, over the iterations from one to the next.
        largest_block: Its share of the state.
        outcomes: Of every strategy with every share of lost blocks.

    """

    seed: int
    converged: float
    failed: int
    saves: dict[str, int]
    nbytes: dict[str, int]
    nominal: dict[str, float]
    largest_block: float
    outcomes: list[Outcome]


def run(task: Task, seed: int, strategies: Sequence[Strategy] = STRATEGIES) -> Trial:
    """Trains undisturbed, then again up to a failure, and on from there after each recovery."""
    losses = descent(task.start(seed), task.iterations)
    converged = first_below(losses, losses[-1])
    fate = chance(seed, _FATE)
    failed = strikes_after(seed, math.ceil(converged) - 1, fate)
    training = task.start(seed)
    with ExitStack() as stack:
        own = [strategy for strategy in strategies if task.suits(strategy)]
        runs = [(strategy, stack.enter_context(_running(task, seed, strategy))) for strategy in own]
        block_map = _taken_apart(training, task).map
        largest_block = int(block_map.nbytes.max()) / block_map.state_bytes
        every = [strategy.every(largest_block) for strategy in own]
        savers = [_Saver(running, steps) for (_, running), steps in zip(runs, every, strict=True)]
        _train(training, savers, failed)
        failure = Failure(task, training, losses[-1], converged, fate)
        outcomes = [failure.recover(strategy, running, lost) for strategy, running in runs for lost in LOST]
        saves = {strategy.name: running.stats.saves - 1 for strategy, running in runs}
        named = {strategy.name: saver for strategy, saver in zip(own, savers, strict=True)}
        nbytes = {name: saver.bytes_written for name, saver in named.items()}
        nominal = {name: saver.nominal for name, saver in named.items()}
    return Trial(seed, converged, failed, saves, nbytes, nominal, largest_block, outcomes)


class Failure:
    """A training that is about to lose blocks.

    Args:
        task: Its task.
        training: The training.
        threshold: The loss at which it counts as converged.
        converged: When the undisturbed one does.
        fate: Chooses the order in which blocks are lost.

    """

    def __init__(
        self,
        task: Task,
        training: Training,
        threshold: float,
        converged: float,
        fate: torch.Generator,
    ) -> None:
        self._task = task
        self._training = training
        self._threshold = threshold
        self._converged = converged
        keys = list(_taken_apart(training, task).map.numbers)
        self._order = [keys[i] for i in torch.randperm(len(keys), generator=fate).tolist()]

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


def strikes_after(seed: int, last: int, fate: torch.Generator) -> int:
    """The iteration after which a failure comes.

    The period is drawn from a geometric distribution whose mean is the middle of the training, but for its end; not the
    first one, in which strategies hardly differ in what they have saved. The place within the period goes round from
    trial to trial, so that a full checkpoint is as old in the mean of few trials as it is of many.

    Args:
        seed: Of the trial.
        last: The last iteration that may be chosen.
        fate: Draws.

    """
    periods = max(1, (last + 1) // PERIOD - 1)
    while True:
        period = int(torch.empty(1).geometric_(2 / (1 + periods), generator=fate))
        if period <= periods:
            return period * PERIOD + _PLACES[seed % PERIOD]


@contextmanager
def _running(task: Task, seed: int, strategy: Strategy) -> Iterator[RunningCheckpoint]:
    """A running checkpoint in memory, for as long as it is needed."""
    folder = f"/paper/{task.name}/{seed}/{strategy.name}"
    # By itself the policy draws the same for the same step, whatever the trial.
    policy = partial(_at_random, seed) if strategy.policy == "random" else strategy.policy
    settings = Settings(
        strategy.fraction, policy, task.block_size, staging="eager", on_write_error="raise", refresh=strategy.refresh
    )
    try:
        with RunningCheckpoint(f"memory:/{folder}", settings) as running:
            yield running
    finally:
        fsspec.filesystem("memory").rm(folder, recursive=True)


def _at_random(seed: int, candidates: Candidates) -> Tensor:
    return random(replace(candidates, step=chance(seed, _FATE - candidates.step).initial_seed()))


class _Saver:
    """Saves a training every few iterations, and counts.

    Args:
        running: Where to.
        every: Iterations from save to save.

    """

    def __init__(self, running: RunningCheckpoint, every: int) -> None:
        self.every = every
        self._running = running
        self._first_bytes = 0
        self._sizes: list[int] = []

    def save(self, training: Training, iteration: int) -> None:
        """Saves, and returns when all of it is written."""
        state, optimizers, parameters = training.checkpoint(), training.optimizers(), training.parameters()
        self._running.save(state, iteration, optimizers=optimizers, parameters=parameters, wait=True)
        save = self._running._save
        assert save is not None
        self._running.flush()
        if iteration == _FIRST:
            self._first_bytes = self._running.stats.bytes_written
        else:
            self._sizes.append(sum(map(_nominal, save.parts)))

    @property
    def bytes_written(self) -> int:
        """Bytes of files since the first save."""
        return self._running.stats.bytes_written - self._first_bytes

    @property
    def nominal(self) -> float:
        """Bytes of exact blocks and of the refresh of a save, over the iterations from one to the next."""
        return sum(self._sizes) / len(self._sizes) / self.every


def _nominal(part: Part) -> int:
    refresh = part.refresh()
    return sum(rows.nbytes for rows in part.rows) + (refresh.nbytes if refresh is not None else 0)


def _train(training: Training, savers: Sequence[_Saver], iterations: int) -> None:
    """Trains and saves in all ways at once, each in its interval."""
    for iteration in range(1, iterations + 1):
        training.step()
        for saver in savers:
            if iteration == _FIRST or iteration % saver.every == 0:
                saver.save(training, iteration)


def _taken_apart(training: Training, task: Task) -> LiveState:
    dissection = Dissection(Ranks(), task.block_size)
    return dissection.take_apart(training.checkpoint(), training.optimizers(), training.parameters())


@torch.no_grad()
def _lose(state: LiveState, keys: set[str]) -> None:
    """Overwrites blocks with NaN, their optimizer rows too."""
    for group, tensors in zip(state.map.groups, state.of(state.map), strict=True):
        for i in range(len(group)):
            if group.key(i) in keys:
                for tensor in tensors:
                    tensor[slice(*group.span(i))] = torch.nan
