"""Ways through an outage of the server, or of a rank, simulated in one process and in units of one update.

In a unit every worker computes the gradients of a batch of its own, and the optimizer takes a step along their mean.
What needs no gradients takes no time: falling back to a checkpoint, and the steps that are made of stale gradients.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from benchmarks.paper.training import ModuleTraining
from lightning_scar.core.gradient_buffer import Mode, StaleGradientBuffer

#: The paper's rule: with more gradients pending than this ...
PENDING = 50
#: ... the learning rate is multiplied by this for the step that they make.
LOWERED = 0.1
#: Updates between two checkpoints of the server, or two copies that its asynchronous backup gets.
_EVERY = 10
#: Units until a backup has taken over, or survivors have formed their smaller group.
_FAILOVER = 1


@dataclass(frozen=True)
class Schedule:
    """How long a run takes, and when it is disturbed.

    Attributes:
        units: Its length.
        down_at: When outages begin.
        down_for: How long each of them is.
        workers: How many compute gradients.

    """

    units: int
    down_at: tuple[int, ...]
    down_for: int
    workers: int = 3

    @property
    def moments(self) -> list[int]:
        """Times at which ways are compared, from the first update after the last outage to the end."""
        back = self.down_at[-1] + self.down_for
        left = self.units - back
        return [back + 1, back + left // 4, back + left // 2, self.units]


class Cluster:
    """A training by several workers.

    Args:
        training: What they train together.
        workers: How many there are.
        every: Updates between two states that outlive the server; 1 if its state is never lost.

    Attributes:
        workers: How many there are.
        at_work: How many of them, at most, compute a batch of their own in a unit.
        usual: The norm of the last ordinary gradient.
        losses: After each unit so far.

    """

    def __init__(self, training: ModuleTraining, workers: int, every: int = 1) -> None:
        self.training = training
        self.at_work = self.workers = workers
        self.usual = math.inf
        self.losses: list[float] = []
        self._every = every
        self._updates = self._rounds = 0
        self._saved = self._state()

    def wait(self, units: int) -> None:
        """Lets time go by."""
        self.losses += [self.losses[-1] if self.losses else self.training.loss()] * units

    def update(self, units: int) -> None:
        """Makes ordinary updates."""
        for _ in range(units):
            self.compute()
            self.usual = float(clip_grad_norm_(self.training.parameters(), math.inf))
            self.training.optimizer.step()
            self._updates += 1
            if self._every > 1 and self._updates % self._every == 0:
                self._saved = self._state()
            self.losses.append(self.training.loss())

    def compute(self) -> int:
        """Puts the mean of the workers' next gradients in place.

        Returns:
            How many samples it is a mean over.

        """
        samples, grads = 0, []
        for worker in range(self.at_work):
            samples += self.training.backward(self._batch(worker))
            grads.append([parameter.grad for parameter in self.training.parameters()])
        for parameter, *theirs in zip(self.training.parameters(), *grads, strict=True):
            parameter.grad = torch.stack(theirs).mean(0)
        self._rounds += 1
        return samples

    def drift(self, units: int) -> None:
        """Lets every worker train a copy, all alone, and averages them, with the states of their optimizers."""
        start, copies = self._state(), []
        for worker in range(self.at_work):
            self._load(start)
            for ahead in range(units):
                self.training.backward(self._batch(worker, ahead))
                self.training.optimizer.step()
            copies.append([tensor.clone() for tensor in self._tensors()])
        for tensor, *theirs in zip(self._tensors(), *copies, strict=True):
            tensor.copy_(torch.stack(theirs).mean(0))
        self._rounds += units

    def fall_back(self) -> None:
        """Loses the updates since the last state that was saved; the workers' batches go on."""
        if self._every > 1:
            self._load(self._saved)
            self._updates -= self._updates % self._every

    def _batch(self, worker: int, ahead: int = 0) -> int:
        return (self._rounds + ahead) * self.workers + worker

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return copy.deepcopy((self.training.model.state_dict(), self.training.optimizer.state_dict()))

    def _load(self, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
        model, optimizer = copy.deepcopy(state)
        self.training.model.load_state_dict(model)
        self.training.optimizer.load_state_dict(optimizer)

    def _tensors(self) -> list[Tensor]:
        states = self.training.optimizer.state.values()
        held = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return [*self.training.model.state_dict().values(), *held]


def train(cluster: Cluster, units: int, failover: int = 0) -> None:
    """Who is left goes on with ordinary updates."""
    cluster.wait(failover)
    cluster.update(units - failover)


def cover(cluster: Cluster, units: int) -> None:
    """Who is left computes the batches of all: the updates are those without a failure, and each takes longer."""
    cluster.wait(_FAILOVER)
    present, cluster.at_work = cluster.at_work, cluster.workers
    for unit in range(units - _FAILOVER):
        is_ready = (unit + 1) * present // cluster.workers > unit * present // cluster.workers
        cluster.update(1) if is_ready else cluster.wait(1)


def local(cluster: Cluster, units: int) -> None:
    """Local SGD; nobody sees the copies before they are averaged."""
    cluster.wait(units)
    cluster.drift(units)


#: Makes a step of the gradients in place: the mean over so many units.
Apply = Callable[[Cluster, int], None]


def mean_step(cluster: Cluster, units: int) -> None:
    """The step of one large batch."""
    cluster.training.optimizer.step()


def sum_step(cluster: Cluster, units: int) -> None:
    """The paper's: as long as the missed updates together, with a lower rate if too many gradients were pending.

    The paper sums over workers in ordinary updates, too. Here these take the mean, so the sum is the mean of all
    gradients times the units, not times the gradients.
    """
    _stretch(cluster, units)
    optimizer = cluster.training.optimizer
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * (LOWERED if units * cluster.at_work > PENDING else 1)
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def clipped_step(cluster: Cluster, units: int) -> None:
    """The sum, at most as long as an ordinary gradient."""
    _stretch(cluster, units)
    clip_grad_norm_(cluster.training.parameters(), cluster.usual)
    cluster.training.optimizer.step()


def _stretch(cluster: Cluster, factor: float) -> None:
    for parameter in cluster.training.parameters():
        if parameter.grad is not None:
            parameter.grad *= factor


def collect(
    cluster: Cluster,
    units: int,
    mode: Mode = "mean",
    discount: bool = False,
    apply: Apply = mean_step,
    lasts: bool = True,
) -> None:
    """Who is left computes gradients at the weights there are; they are applied when the outage is over.

    One buffer stands for those of all workers: the mean over them is one contribution, as in a group.
    """
    cluster.wait(units if lasts else 0)
    buffer = StaleGradientBuffer(cluster.training.parameters(), mode, discount)
    for _ in range(units):
        buffer.add(cluster.compute())
    for step in buffer.steps():
        apply(cluster, step.contributions)


@dataclass(frozen=True)
class Way:
    """A way through outages.

    Attributes:
        name: What it is called.
        through: Brings a cluster through an outage of so many units.
        lost: How many workers are gone meanwhile.
        every: Updates between two states that outlive the server; 1 if its state is never lost.

    """

    name: str
    through: Callable[[Cluster, int], None]
    lost: int = 0
    every: int = 1


#: Without a failure; ``large_batch`` makes one step of an outage's batches in no time.
BASELINES = (Way("none", train), Way("large_batch", partial(collect, lasts=False)))

#: A parameter server is down. A discount in ``mean`` would only weigh gradients of the same weights differently, so
#: ``discount`` replays.
SERVER = (
    Way("checkpoint", Cluster.wait, every=_EVERY),
    Way("chain", partial(train, failover=_FAILOVER)),
    Way("chain_async", partial(train, failover=_FAILOVER), every=_EVERY),
    Way("sum", partial(collect, apply=sum_step)),
    Way("mean", collect),
    Way("replay", partial(collect, mode="replay")),
    Way("discount", partial(collect, mode="replay", discount=True)),
    Way("clipped", partial(collect, apply=clipped_step)),
    Way("local_server", local),
)

#: One rank of a group is gone; the others still have the state.
GROUP = (
    Way("wait", Cluster.wait, lost=1),
    Way("buffer", collect, lost=1),
    Way("shrink", partial(train, failover=_FAILOVER), lost=1),
    Way("cover", cover, lost=1),
    Way("local_sgd", local, lost=1),
)

WAYS = {way.name: way for way in (*BASELINES, *SERVER, *GROUP)}


def simulate(way: Way, training_factory: Callable[[int], ModuleTraining], seed: int, schedule: Schedule) -> list[float]:
    """Trains through the outages of a schedule.

    Args:
        way: How.
        training_factory: Makes the training of a seed.
        seed: Which one.
        schedule: When outages are.

    Returns:
        The loss after each unit; as before while nothing is updated.

    """
    cluster = Cluster(training_factory(seed), schedule.workers, way.every)
    for down_at in schedule.down_at:
        cluster.update(down_at - len(cluster.losses))
        cluster.at_work = schedule.workers - way.lost
        cluster.fall_back()
        way.through(cluster, schedule.down_for)
        cluster.at_work = schedule.workers
    cluster.update(schedule.units - len(cluster.losses))
    return cluster.losses
