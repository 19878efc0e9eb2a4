"""Trainings written as loops, for Accelerate, Fabric and plain PyTorch, that do what those of the Trainer do."""

import contextlib
import copy
import os
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration
from fault_runs import with_memory
from helpers import BATCH_SIZE, Stopped, samples
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader

from lightning_scar.loops.accelerate import SCARAccelerator
from lightning_scar.loops.loop import SCARLoop

EXACT = {"fraction": 1.0, "full_every_n_saves": 1}


class Net(nn.Module):
    """Has the names and the first values of the Trainer's ``TinyModel``."""

    def __init__(self, width: int = 32, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        between = [nn.BatchNorm1d(width)] if norm else [nn.ReLU()]
        self.net = nn.Sequential(nn.Linear(8, width), *between, nn.Linear(width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def accelerator(**options: Any) -> Accelerator:
    """A new one, as in a new process."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    return Accelerator(cpu=True, **options)


def seedable(**options: Any) -> Accelerator:
    return accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True), **options)


@dataclass
class Loop:
    """What one process saw of a training.

    ``start`` and ``final`` are checkpoint dicts, ``live`` has one for every step.
    """

    scar: SCARLoop | None = None
    error: tuple[str, str] | None = None
    start: dict[str, Any] = field(default_factory=dict)
    final: dict[str, Any] = field(default_factory=dict)
    live: dict[int, dict[str, Any]] = field(default_factory=dict)
    seen: list[tuple[int, float]] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)

    def dump(self) -> dict[str, Any]:
        assert self.scar is not None
        return copy.deepcopy(self.scar.state.dump())


# -- Accelerate ----------------------------------------------------------------------------------------------------


class Ema:
    """Given to ``register_for_checkpointing``: an average of the weights, and a count."""

    def __init__(self, module: nn.Module) -> None:
        self.average = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self.updates = 0

    def update(self, module: nn.Module) -> None:
        self.updates += 1
        for name, value in module.state_dict().items():
            self.average[name].lerp_(value, 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average, self.updates = state["average"], state["updates"]


class Ways:
    """What a training is like: how many models and optimizers, which data, what else."""

    accumulates = 1
    precision = "no"
    clips = False
    batches = 16
    shuffles = True
    evens_out = True
    config: dict[str, Any] = {"use_seedable_sampler": True}  # noqa: RUF012
    workers = 0

    def __init__(self, first_values: int | None) -> None:
        """``first_values`` is a seed of other ones than the models' own."""
        config = DataLoaderConfiguration(even_batches=self.evens_out, **self.config)
        self.accelerator = accelerator(
            dataloader_config=config,
            gradient_accumulation_steps=self.accumulates,
            mixed_precision=self.precision,
        )
        self.models = self.make_models()
        if first_values is not None:
            for parameter in (parameter for model in self.models for parameter in model.parameters()):
                parameter.data.normal_(generator=torch.Generator().manual_seed(first_values))
        self.optimizers = self.make_optimizers()
        data = DataLoader(samples(self.batches), batch_size=BATCH_SIZE, shuffle=self.shuffles, num_workers=self.workers)
        self.models = [self.accelerator.prepare(model) for model in self.models]
        self.optimizers = [self.accelerator.prepare(optimizer) for optimizer in self.optimizers]
        self.loader = self.accelerator.prepare(data)
        self.schedulers: list[Any] = []

    def make_models(self) -> list[Any]:
        return [Net()]

    def make_optimizers(self) -> list[Any]:
        return [Adam(model.parameters(), lr=0.01) for model in self.models]

    def batch(self, x: torch.Tensor, y: torch.Tensor) -> None:
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            loss = nn.functional.mse_loss(model(x), y)
            self.accelerator.backward(loss)
            if self.clips and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in self.schedulers:
            scheduler.step()


class Clipped(Ways):
    clips = True


class Accumulated(Ways):
    accumulates = 3
    clips = True


class HalfPrecision(Ways):
    precision = "bf16"


class Scheduled(Ways):
    def __init__(self, first_values: int | None) -> None:
        super().__init__(first_values)
        (optimizer,) = self.optimizers
        self.schedulers = [self.accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5))]

    def make_optimizers(self) -> list[Any]:
        return [SGD(self.models[0].parameters(), lr=0.1, momentum=0.9)]


class TwoModels(Ways):
    def make_models(self) -> list[Any]:
        return [Net(), Net(width=16, norm=True)]


class Averaged(Ways):
    def __init__(self, first_values: int | None) -> None:
        super().__init__(first_values)
        self.ema = Ema(self.accelerator.unwrap_model(self.models[0]))
        self.accelerator.register_for_checkpointing(self.ema)

    def batch(self, x: torch.Tensor, y: torch.Tensor) -> None:
        super().batch(x, y)
        self.ema.update(self.accelerator.unwrap_model(self.models[0]))


class RandomInTheLoop(Ways):
    """Draws random numbers in every batch."""

    def batch(self, x: torch.Tensor, y: torch.Tensor) -> None:
        super().batch(x + torch.randn(x.shape), y)


class WithoutASeed(Ways):
    config: dict[str, Any] = {}  # noqa: RUF012


class Stateful(Ways):
    config = {"use_stateful_dataloader": True}  # noqa: RUF012


class SeedableWithWorkers(Ways):
    workers = 2


class Split(Ways):
    config = {"split_batches": True}  # noqa: RUF012


class Dispatched(Ways):
    config = {"dispatch_batches": True}  # noqa: RUF012


class Poisoned(Ways):
    """A row of the weights turns NaN on the first rank, behind the sixth batch."""

    seen = 0

    def batch(self, x: torch.Tensor, y: torch.Tensor) -> None:
        super().batch(x, y)
        self.seen += 1
        if self.seen == 6 and self.accelerator.process_index == 0:
            weight = self.accelerator.unwrap_model(self.models[0]).net[0].weight
            weight.data[3] = torch.nan


class Uneven(Ways):
    """One rank has a batch more than the other, and makes a step more, by itself."""

    batches = 15
    evens_out = False

    def batch(self, x: torch.Tensor, y: torch.Tensor) -> None:
        # Without a wrapper: whoever has no batch left would be missed in the others' steps.
        self.models = [self.accelerator.unwrap_model(model) for model in self.models]
        super().batch(x, y)


WAYS: dict[str, type[Ways]] = {
    "Adam": Ways,
    "clipping": Clipped,
    "accumulated gradients": Accumulated,
    "bf16": HalfPrecision,
    "a schedule": Scheduled,
    "two models": TwoModels,
    "an average of the weights": Averaged,
    "random numbers": RandomInTheLoop,
    "without a seed": WithoutASeed,
    "stateful loaders": Stateful,
    "two workers of a loader": SeedableWithWorkers,
    "split batches": Split,
    "dispatched batches": Dispatched,
    "uneven": Uneven,
    "poisoned": Poisoned,
}


#: Those of which a resumed training does not end as an uninterrupted one.
SPECIAL = ("uneven", "poisoned")


def train(
    rank: int,
    dirpath: str | Path,
    *,
    way: str = "Adam",
    after: int | None = None,
    scar: dict[str, Any] | None = None,
    epochs: int = 2,
) -> Loop:
    """An Accelerate loop as one of the ranks of the default group, or alone.

    Args:
        rank: This process.
        dirpath: Where to save.
        way: One of ``WAYS``.
        after: The batch before which it crashes.
        scar: Options of :class:`SCARAccelerator`; by default it saves everything at every step.
        epochs: How many.
    """
    loop = Loop()
    _be_one_of_several(rank)
    torch.manual_seed(5)
    with warnings.catch_warnings(record=True) as caught, contextlib.suppress(Stopped):
        warnings.simplefilter("always")
        # What would be right by chance must go wrong; and ranks differ in what they begin with.
        made = WAYS[way](rank if Path(dirpath).exists() or rank else None)
        try:
            options = {"every_n_steps": 1, "save_on_exception": False, **EXACT, **(scar or {})}
            _train(made, loop, dirpath, after, epochs, options)
        except Stopped:
            raise
        except Exception as error:
            loop.error = type(error).__name__, str(error)
    loop.warned = [str(warning.message) for warning in caught]
    loop.stats = vars(loop.scar.stats) if loop.scar is not None else {}
    loop.scar = None
    return loop


def _train(
    made: Ways, loop: Loop, dirpath: str | Path, after: int | None, epochs: int, options: dict[str, Any]
) -> None:
    accelerator, loader = made.accelerator, made.loader
    with SCARAccelerator(accelerator, dirpath, **options) as scar:
        loop.scar = scar
        scar.resume()
        loop.start = loop.dump()
        for epoch in range(scar.epoch, epochs):
            for x, y in scar.batches(loader):
                if scar.batches_done == after:
                    raise Stopped
                loop.seen.append((epoch, float(x.sum())))
                with accelerator.accumulate(*made.models):
                    made.batch(x, y)
                    scar.step()
                loop.live.setdefault(scar.steps, loop.dump())
        loop.final = loop.dump()


def train_in_turn(rank: int, *calls: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Loop]:
    """Several trainings in the same processes, which are dear to start."""
    return [train(rank, *args, **kwargs) for args, kwargs in calls]


def _be_one_of_several(rank: int) -> None:
    """Sets what ``accelerate launch`` would set, if there is a group."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        size = str(torch.distributed.get_world_size())
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}


def train_zero(rank: int, dirpath: Path, after: int | None = None) -> dict[str, Any]:
    """A plain loop with a sharded optimizer, which Accelerate cannot prepare; returns its last checkpoint dict."""
    model = DistributedDataParallel(Net())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=Adam, lr=0.01)
    data = [x for x, _ in DataLoader(samples(), batch_size=BATCH_SIZE)]
    state = {"model": model, "optimizer": optimizer}
    options: dict[str, Any] = {"every_n_steps": 1, "fraction": 1.0, "full_every_n_saves": 1}
    with contextlib.suppress(Stopped), SCARLoop(dirpath, state, **options, save_on_exception=False) as scar:
        for batch in range(scar.resume(), 8):
            if batch == after:
                raise Stopped
            optimizer.zero_grad()
            model(data[batch] + rank).square().mean().backward()
            optimizer.step()
            scar.step()
    return {part: scar.state.dump()[part] for part in ("state_dict", "optimizer_states")}


# -- killed from outside -------------------------------------------------------------------------------------------


def write_diary(dirpath: Path, path: Path, max_steps: int = 100_000, host: Path | None = None, **options: Any) -> None:
    """Writes down, after every step, what is live, as ``fault_runs.Diary`` does."""

    class Diary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(8, 64)

    accelerator = Accelerator(cpu=True)
    model = Diary()
    optimizer = Adam(model.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    settings = {"every_n_steps": 2, "fraction": 0.3, "block_size": 64, **options, **with_memory(host)}
    batches = [x for x, _ in DataLoader(samples(), batch_size=BATCH_SIZE)]
    with SCARAccelerator(accelerator, dirpath, **settings) as scar, open(path, "ab", buffering=0) as file:
        for batch in range(scar.resume(), max_steps):
            accelerator.backward(model.net(batches[batch % len(batches)]).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            time.sleep(0.003)
            scar.step()
            tensors = [
                tensor.detach().flatten()
                for parameter in model.parameters()
                for tensor in (
                    parameter,
                    optimizer.state[parameter]["exp_avg"],
                    optimizer.state[parameter]["exp_avg_sq"],
                )
            ]
            file.write(torch.cat([torch.tensor([float(scar.steps)]), *tensors]).numpy().tobytes())


def train_counted(dirpath: Path, path: Path, seen: Path, accumulates: int = 1) -> None:
    """A training that saves only when it is told to stop."""
    made = Slow(None) if accumulates == 1 else SlowAndAccumulated(None)
    loop = Loop()
    made.path = path
    try:
        _train(made, loop, dirpath, None, 4, {"every_n_steps": 1000, "fraction": 1.0})
    finally:
        torch.save(loop.seen, seen)


class Slow(Ways):
    """Adds a byte to a file for every batch."""

    path: Path

    def batch(self, x: torch.Tensor, y: torch.Tensor) -> None:
        super().batch(x, y)
        with open(self.path, "ab", buffering=0) as file:
            file.write(b".")
        time.sleep(0.02)


class SlowAndAccumulated(Slow, Accumulated):
    """Both."""
