"""The error of the estimated rework cost: ``python -m benchmarks.rework --json OUT``.

Trainings on handwritten digits save an eighth of their state every few steps, once with the low-precision refresh of
the rest (``sgd_refresh``), once without it (``sgd``). Some are killed, right after a save and halfway to the next one:
a second training resumes from the folder with the batch after its last save. The measured rework cost is the number of
steps after which its loss is back where the first training's loss was at the kill. Both losses are taken over the
training digits and averaged over a window of steps; the first training continues, so that its window is complete.

The estimate uses the scores of the save, not the loss. It is compared with the paper's bound for the distance to the
folder's state, with the speed in place of the step length and for slow convergence.

Learning rates and batches are chosen such that the loss still falls visibly: if it only fluctuates, there is no step at
which it is back.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from benchmarks import report
from benchmarks.data import Images, mnist
from benchmarks.report import median
from lightning_scar import load
from lightning_scar.core.restoration import restore
from lightning_scar.core.rework import Motion, motion, rework_bound
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings
from lightning_scar.storage.store import DeltaStore

FRACTION = 0.125
#: Whether saves hold a refresh, by the suffix of the task's name.
Refresh = Literal["auto"] | None
KINDS: dict[str, Refresh] = {"": None, "_refresh": "auto"}
#: Steps on both sides over which a loss is averaged.
RADIUS = 10
#: What the figures of an estimate are called.
ERRORS = ("steps", "off_by_steps", "off_by_at_most_steps", "ratio", "ratio_at_most")
#: A contraction so slow that the bound is its limit: distance over speed.
SLOW = 1 - 1e-6


class Regression(nn.Module):
    """Multinomial logistic regression; each row of its weight belongs to one pixel."""

    def __init__(self, pixels: int = 784) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(pixels, 10))
        self.bias = nn.Parameter(torch.zeros(10))

    def forward(self, images: Tensor) -> Tensor:
        return images @ self.weight + self.bias


def cnn() -> nn.Module:
    """Return two convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Conv2d(8, 16, 5, stride=2, padding=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


@dataclass(frozen=True)
class Task:
    """A training, and when it is saved and killed.

    Attributes:
        name: Its name.
        model: Makes the model.
        optimizer: Makes its optimizer.
        batch_size: Digits in a batch.
        block_size: Bytes of a block.
        every: Steps between saves.
        saves: The steps of the saves after which it is killed; and once more half of ``every`` later.
        patience: Steps after which the loss counts as back in any case.

    """

    name: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[Tensor]], Optimizer]
    batch_size: int
    block_size: int
    every: int
    saves: Sequence[int]
    patience: int


def sgd(parameters: Iterable[Tensor]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def adam(parameters: Iterable[Tensor]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=3e-4)


TASKS = [
    Task("sgd", Regression, sgd, 64, 160, 4, (48, 96, 144, 192, 240), 40),
    Task("sgd_rarely", Regression, sgd, 64, 160, 24, (288, 384, 480), 120),
    Task("adam", cnn, adam, 256, 2048, 4, (48, 96, 144, 192), 40),
]
SMALL = [
    Task("sgd", Regression, sgd, 64, 160, 4, (48,), 20),
    Task("adam", cnn, adam, 256, 2048, 4, (48,), 20),
]


class Training:
    """A training whose steps depend only on the seed and the number of the step.

    Args:
        task: What to train.
        digits: The training data.
        seed: The seed of the initial values and the order of the digits.

    """

    def __init__(self, task: Task, digits: Images, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = task.model()
        self.optimizer = task.optimizer(self.model.parameters())
        self.steps = 0
        self._digits = digits
        self._batch_size = task.batch_size
        self._seed = seed

    def step(self) -> None:
        """Make one optimizer step."""
        epoch, batch = divmod(self.steps, len(self._digits.labels) // self._batch_size)
        generator = torch.Generator().manual_seed(10_000 * self._seed + epoch)
        order = torch.randperm(len(self._digits.labels), generator=generator)
        chosen = order[batch * self._batch_size : (batch + 1) * self._batch_size]
        self.optimizer.zero_grad()
        cross_entropy(self.model(self._digits.pixels[chosen]), self._digits.labels[chosen]).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.steps += 1

    @torch.no_grad()
    def loss(self) -> float:
        """Return the mean loss over every fourth digit."""
        return float(cross_entropy(self.model(self._digits.pixels[::4]), self._digits.labels[::4]))

    def checkpoint(self) -> dict[str, Any]:
        """Return the state as a checkpoint dict of Lightning's shape."""
        return {
            "state_dict": self.model.state_dict(),
            "optimizer_states": [self.optimizer.state_dict()],
            "global_step": self.steps,
        }

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Load what :meth:`checkpoint` returned."""
        self.model.load_state_dict(checkpoint["state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer_states"][0])
        self.steps = checkpoint["global_step"]

    def save(self, running: RunningCheckpoint) -> None:
        """Save, and wait until the save is durable and the next one can build on it."""
        running.save_now(
            self.checkpoint(),
            self.steps,
            optimizers={("optimizer_states", 0): self.optimizer},
            parameters=self.model.parameters(),
        )
        running._writer.drain()


class Scores(NamedTuple):
    """Measurements of every block, one element per block.

    Attributes:
        distance: L2 distance to its base.
        lag: L2 distance to what a restart would load, base and refresh together.
        age: Steps since its base.

    """

    distance: Tensor
    lag: Tensor
    age: Tensor


def score(training: Training, folder: Path) -> Scores:
    """Compare a live training with a folder, block by block."""
    held = restore(DeltaStore(folder), with_bases=True)
    live = {f"state_dict/{name}": value.detach().double() for name, value in training.model.named_parameters()}
    refreshed = {f"state_dict/{name}": value for name, value in held.checkpoint["state_dict"].items()}
    found: list[list[Tensor]] = [[], []]
    ages = []
    for group in held.map.groups:
        if group.name not in live:
            continue
        for own, there in zip(found, (held.bases, refreshed), strict=True):
            difference = live[group.name] - there[group.name]
            own += [difference[slice(*group.span(i))].norm() for i in range(len(group))]
        ages += [training.steps - held.plan.versions[group.key(i)].step for i in range(len(group))]
    distance, lag = map(torch.stack, found)
    return Scores(distance, lag, torch.tensor(ages))


@dataclass
class Kill:
    """A kill of a training, and what was known then, in steps.

    Attributes:
        task: The training's name, with ``_refresh`` if saves held one.
        seed: Its seed.
        step: The step of the kill.
        since_save: Steps since the last save.
        distance: L2 distance between the live parameters and the folder's.
        estimate: The estimated rework cost.
        bound: The paper's bound for the distance.
        measured: The measured rework cost.

    """

    task: str
    seed: int
    step: int
    since_save: int
    distance: float
    estimate: float
    bound: float
    measured: float = math.nan


def killed(task: Task, digits: Images, seed: int, folder: Path, kind: str) -> list[Kill]:
    """Train, and train again from the folder's state after some saves.

    Args:
        task: What to train.
        digits: The training data.
        seed: The training's seed.
        folder: Where to save.
        kind: One of :data:`KINDS`.

    """
    training, losses = Training(task, digits, seed), dict[int, float]()
    kills: list[Kill] = []
    held: dict[int, dict[str, Any]] = {}
    moved = Motion()
    settings = Settings(fraction=FRACTION, block_size=task.block_size, refresh=KINDS[kind])
    with RunningCheckpoint(folder, settings) as running:
        for step in range(1, max(task.saves) + task.every // 2 + RADIUS + 1):
            training.step()
            last_save = step - step % task.every
            if step % task.every == 0:
                before = score(training, folder) if last_save > task.every else None
                training.save(running)
                if before is not None:
                    moved = motion(*before, rest=before.age > 0)
                if step in task.saves:
                    held[step] = load(folder)
            if last_save in task.saves and step - last_save in (0, task.every // 2):
                distance, speed = float(score(training, folder).lag.norm()), math.sqrt(moved.squared_speed)
                estimate = running.stats.rework_cost + step - last_save
                bound = rework_bound(distance, speed / (1 - SLOW), SLOW)
                kills.append(Kill(task.name + kind, seed, step, step - last_save, distance, estimate, bound))
            losses[step] = training.loss()
    for save, checkpoint in held.items():
        resumed = resume(task, digits, seed, checkpoint)
        for kill in kills:
            if kill.step - kill.since_save == save:
                kill.measured = first_below(resumed, smooth(losses, kill.step, RADIUS))
    return kills


def resume(task: Task, digits: Images, seed: int, checkpoint: dict[str, Any]) -> list[float]:
    """Return the smoothed loss of a training from a checkpoint, before its first step and after each."""
    training = Training(task, digits, seed)
    training.load(checkpoint)
    losses = {0: training.loss()}
    for step in range(1, task.patience + RADIUS + 1):
        training.step()
        losses[step] = training.loss()
    # Right after the restart there is less to average over, but there the loss falls fast with little noise.
    return [smooth(losses, step, min(step, RADIUS)) for step in range(task.patience + 1)]


def smooth(losses: dict[int, float], step: int, radius: int) -> float:
    """Return the mean loss over the steps around one."""
    return sum(losses[step + i] for i in range(-radius, radius + 1)) / (2 * radius + 1)


def first_below(losses: Sequence[float], level: float) -> float:
    """Return the interpolated step at which a loss first falls to a level; the last step if it never does."""
    if losses[0] <= level:
        return 0.0
    for step, (before, after) in enumerate(pairwise(losses), start=1):
        if after <= level:
            return step - (level - after) / (before - after)
    return float(len(losses) - 1)


def summary(kills: Sequence[Kill]) -> dict[str, float]:
    """Return each task's median steps, the errors of estimate and bound, and their ratios to the measured cost."""
    found = {}
    for name in dict.fromkeys(kill.task for kill in kills):
        own = [kill for kill in kills if kill.task == name]
        found[f"{name}_measured_steps"] = median([kill.measured for kill in own])
        for what in ("estimate", "bound"):
            off = [abs(getattr(kill, what) - kill.measured) for kill in own]
            found[f"{name}_{what}_steps"] = median([getattr(kill, what) for kill in own])
            found[f"{name}_{what}_off_by_steps"] = median(off)
            found[f"{name}_{what}_off_by_at_most_steps"] = max(off)
            ratios = [getattr(kill, what) / kill.measured for kill in own if kill.measured]
            found[f"{name}_{what}_ratio"] = median(ratios)
            found[f"{name}_{what}_ratio_at_most"] = max(ratios, default=math.nan)
    return found


def main() -> None:
    """Measure, print and write JSON."""
    options = report.arguments((__doc__ or "").split("\n")[0], rounds=3).parse_args()
    rounds = options.rounds or (2 if options.quick else 3)
    digits, kills = mnist(), []
    with report.scratch(options.dir) as folder:
        for task, kind in product(SMALL if options.quick else TASKS, KINDS):
            for seed in range(rounds):
                report.progress(f"{task.name}{kind}, training {seed + 1} of {rounds}")
                kills += killed(task, digits, seed, folder / f"{task.name}{kind}-{seed}", kind)
    found = summary(kills)
    columns = ["training", "seed", "step", "since save", "distance", "estimate", "bound", "measured"]
    rows = [
        [k.task, *map(str, (k.seed, k.step, k.since_save)), f"{k.distance:.3f}"]
        + [f"{steps:.1f}" for steps in (k.estimate, k.bound, k.measured)]
        for k in kills
    ]
    report.show("rework cost in steps", columns, rows, [])
    medians = [
        [name, what, f"{found[f'{name}_measured_steps']:.2f}"]
        + [f"{found[f'{name}_{what}_{error}']:.2f}" for error in ERRORS]
        for name in dict.fromkeys(kill.task for kill in kills)
        for what in ("estimate", "bound")
    ]
    columns = ["training", "", "measured", "median", "off by", "at most", "ratio", "at most"]
    report.show("medians, in steps", columns, medians, [])
    settings = {"fraction": FRACTION, "rounds": rounds, "radius": RADIUS}
    report.write(options.json, {**found, "kills": [asdict(kill) for kill in kills], "settings": settings}, [])


if __name__ == "__main__":
    main()
