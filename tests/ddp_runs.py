"""Real trainings with DDP over gloo. The functions that begin with ``rank`` as an argument run on every rank."""

import copy
import os
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from helpers import BATCH_SIZE, StopAfter, Stopped, TinyModel, make_trainer, samples, saver
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from zoo import Alternating, Raw, WithBatchNorm, WithSchedule

from lightning_scar import SCARCheckpoint
from lightning_scar.lightning import private
from lightning_scar.storage.directory import Directory

EXACT = {"fraction": 1.0, "full_every_n_saves": 1}
SMALL = {"fraction": 0.3, "block_size": 64}


def shuffled(batches: int = 16) -> Any:
    """In another order in every epoch; each of two ranks has eight of sixteen batches."""
    data = samples(batches)
    # Not `shuffle=True`: torchdata's sampler has a seed of its own on every rank, and in every process.
    return StatefulDataLoader(data, batch_size=BATCH_SIZE, sampler=DistributedSampler(data))


def in_order(batches: int = 16) -> Any:
    """Lightning gives it a ``DistributedSampler``."""
    return StatefulDataLoader(samples(batches), batch_size=BATCH_SIZE)


def plain(batches: int = 16) -> Any:
    """A loader without a state. On several ranks, Lightning gives it a ``DistributedSampler``."""
    return DataLoader(samples(batches), batch_size=BATCH_SIZE, shuffle=True)


def stateful(batches: int = 16) -> Any:
    """The order is that of torchdata's own sampler, whose seed comes from torch's global generator."""
    torch.manual_seed(5)
    return StatefulDataLoader(samples(batches), batch_size=BATCH_SIZE, shuffle=True)


def of_its_own(batches: int = 16) -> Any:
    """Each rank draws with a generator of its own, so that they see other samples."""
    generator = torch.Generator().manual_seed(5 + dist.get_rank())
    sampler = WeightedRandomSampler([1.0] * 64, 64, generator=generator)
    return DataLoader(samples(batches), batch_size=2 * BATCH_SIZE, sampler=sampler)


def uneven(batches: int = 16) -> Any:
    """Not a multiple of two or three ranks."""
    data = samples(batches)
    return DataLoader(Subset(data, range(len(data) - 1)), batch_size=BATCH_SIZE, shuffle=True)


def long() -> Any:
    """64 batches for each of two ranks, of which each takes a while."""
    return StatefulDataLoader(_Slow(samples(128)), batch_size=BATCH_SIZE)


class _Slow(Dataset[Any]):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        time.sleep(0.001)
        return self.data[i]


# -- models --------------------------------------------------------------------------------------------------------


class WithUnused(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(32, 4)


class BySample(TinyModel):
    """Remembers each sample of each batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        self.seen[-1:] = [(self.current_epoch, float(x.sum())) for x in batch[0]]
        return output


class Sharded(TinyModel):
    """ZeRO, in two groups of parameters."""

    def __init__(self, optimizer_class: Any = Adam, width: int = 32) -> None:
        super().__init__(width)
        self.optimizer_class = optimizer_class

    def configure_optimizers(self) -> Any:
        groups = [{"params": [*self.net[0].parameters()]}, {"params": [*self.net[2].parameters()], "lr": 0.02}]
        return ZeroRedundancyOptimizer(groups, optimizer_class=self.optimizer_class, lr=0.01)


class ByGroups(Sharded):
    """What the sharded one becomes without sharding."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": [*self.net[0].parameters()]}, {"params": [*self.net[2].parameters()], "lr": 0.02}]
        return self.optimizer_class(groups, lr=0.01)


class ByHand(Alternating):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append((self.current_epoch, float(batch[0].sum())))
        super().training_step(batch, batch_idx)


class RawByHand(Raw):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append((self.current_epoch, float(batch[0].sum())))
        super().training_step(batch, batch_idx)


class OfAnotherWidth(TinyModel):
    """Another model on every rank."""

    def __init__(self) -> None:
        super().__init__(width=32 + dist.get_rank())


MODELS: dict[str, Callable[[], TinyModel]] = {
    "Adam": TinyModel,
    "wide": partial(TinyModel, width=512),
    "a schedule": WithSchedule,
    "BatchNorm": WithBatchNorm,
    "unused": WithUnused,
    "by sample": BySample,
    "two optimizers by hand": ByHand,
    "raw optimizers": RawByHand,
    "ZeRO": Sharded,
    "ZeRO of AdamW": partial(Sharded, AdamW),
    "ZeRO of SGD": partial(Sharded, partial(SGD, momentum=0.9)),
    "wide ZeRO": partial(Sharded, width=512),
    "ZeRO without sharding": ByGroups,
    "another on every rank": OfAnotherWidth,
}


# -- what happens meanwhile ----------------------------------------------------------------------------------------


class Watch(Callback):
    """Notes what there is when training starts: loops, loaders and optimizers are restored by then."""

    def __init__(self) -> None:
        self.start: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = copy.deepcopy(private.dump_checkpoint(trainer))


class Signal(Callback):
    """Sends a signal to this process in the middle of a batch, on some ranks."""

    def __init__(self, batch: int, signum: int, ranks: tuple[int, ...]) -> None:
        self.batch, self.signum, self.ranks = batch, signum, ranks

    def on_before_zero_grad(self, trainer: pl.Trainer, *args: Any) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        if done >= self.batch and trainer.global_rank in self.ranks:
            self.ranks = ()
            os.kill(os.getpid(), self.signum)


class Unwritable(Callback):
    """From a batch on, nothing can be written in this process."""

    def __init__(self, batch: int, rank: int) -> None:
        self.batch, self.rank = batch, rank

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, idx: int) -> None:
        if idx == self.batch and trainer.global_rank == self.rank:
            Directory.write = _no_space  # type: ignore[method-assign]


def _no_space(self: Directory, name: str, pieces: Any) -> None:
    raise OSError(28, "No space left on device")


class Slow(Callback):
    """One rank is slow to write."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == self.rank:
            write = Directory.write

            def slow(self: Directory, name: str, pieces: Any) -> None:
                time.sleep(0.1)
                write(self, name, pieces)

            Directory.write = slow  # type: ignore[method-assign]


class Poison(Callback):
    """Writes NaN into rows of a parameter, or of its optimizer state, on some ranks when a batch is over."""

    def __init__(self, *steps: int, ranks: tuple[int, ...] = (0,), slot: str = "param", rows: slice = slice(2, 5)):
        self.steps, self.ranks, self.slot, self.rows = steps, ranks, slot, rows

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step in self.steps and trainer.global_rank in self.ranks:
            weight = pl_module.net[0].weight  # type: ignore[index,union-attr]
            tensor = weight.data if self.slot == "param" else trainer.optimizers[0].state[weight][self.slot]
            tensor[self.rows] = torch.nan


class Healed(Callback):
    """Lets the model remember what is live behind healing, which follows its own hook at the end of a batch."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, TinyModel) and pl_module.live:
            dump = copy.deepcopy(private.dump_checkpoint(trainer))
            pl_module.live[max(pl_module.live)] |= {part: dump[part] for part in ("state_dict", "optimizer_states")}


class OneRankAloneDumps(Callback):
    """What other ranks would have to take part in hangs here."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_rank == trainer.global_step % trainer.world_size:
            private.dump_checkpoint(trainer)


class Notes(DummyLogger):
    """Keeps what is logged, on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        if "scar/saves" in metrics:
            self.rows.append(metrics)


class Patient(Callback):
    """Waits for the disk before every step, so that no save is skipped."""

    def on_before_zero_grad(self, trainer: pl.Trainer, *args: Any) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SCARCheckpoint) and callback._running is not None:
                callback._running.fence()
                callback._running._writer.drain()


# -- a training ----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What one rank saw of a training.

    ``start`` and ``final`` are checkpoint dicts, ``live`` has one for every step; ``weights`` is what ``fit`` leaves.
    """

    error: tuple[str, str] | None = None
    start: dict[str, Any] = field(default_factory=dict)
    final: dict[str, Any] = field(default_factory=dict)
    live: dict[int, dict[str, Any]] = field(default_factory=dict)
    seen: list[tuple[int, float]] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    logged: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)
    tested: Any = None


def launched_by_torchrun(rank: int) -> dict[str, Any]:
    """Makes this process one of torchrun's, and gives the Trainer's options for it."""
    world_size = dist.get_world_size()
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    others = {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in (ranks | others).items()}
    return {"devices": world_size, "strategy": "ddp"}


def train(
    rank: int,
    dirpath: str | Path,
    *callbacks: Callback,
    model: str = "Adam",
    after: int | None = None,
    scar: dict[str, Any] | None = None,
    ddp: dict[str, Any] | None = None,
    data: Callable[[], Any] = shuffled,
    ckpt_path: str | None = None,
    test: str | None = None,
    **options: Any,
) -> Run:
    """A training with :class:`SCARCheckpoint` as one of the ranks of the default group.

    Args:
        rank: This process.
        dirpath: Where to save.
        callbacks: What happens meanwhile.
        model: One of ``MODELS``.
        after: The batch before which all ranks crash.
        scar: Arguments of the callback; by default it saves everything at every step.
        ddp: Arguments of the strategy.
        data: Makes the data.
        ckpt_path: As in ``fit``.
        test: What to test afterwards.
        options: The Trainer's.
    """
    run, watch, notes = Run(), Watch(), Notes()
    launched = launched_by_torchrun(rank) if dist.get_world_size() > 1 else {}
    if ddp is not None:
        launched["strategy"] = DDPStrategy(**ddp)
    module = MODELS[model]()
    for parameter in module.parameters():
        # What would be right by chance must go wrong; and ranks differ in what they begin with.
        if Path(dirpath).exists() or rank:
            parameter.data.normal_(generator=torch.Generator().manual_seed(rank))
    callback = saver(dirpath, **({**EXACT, **scar} if scar else EXACT))
    stop = [StopAfter(after)] if after is not None else []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer = make_trainer(
                callback, *callbacks, watch, *stop, **{"max_epochs": 2, "logger": notes, **launched, **options}
            )
            trainer.fit(module, data(), ckpt_path=ckpt_path)
            run.weights = copy.deepcopy(module.state_dict())
            if test:
                for parameter in module.parameters():
                    parameter.data.zero_()
                run.tested = trainer.test(module, data(), ckpt_path=test), copy.deepcopy(module.state_dict())
        except Stopped:
            pass
        except (Exception, SystemExit) as error:
            run.error = type(error).__name__, str(error)
    run.start, run.final, run.live, run.seen = watch.start, module.final, module.live, module.seen
    run.warned = [str(warning.message) for warning in caught]
    run.stats, run.logged = vars(callback.stats), notes.rows
    return run


def train_in_turn(rank: int, *calls: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Run]:
    """Several trainings in the same processes, which are dear to start."""
    return [train(rank, *args, **kwargs) for args, kwargs in calls]


def train_in_folders_of_their_own(rank: int, folder: Path) -> Run:
    return train(rank, folder / f"of-{rank}")


def kill_oneself(*ranks: int, batch: int = 5) -> Signal:
    return Signal(batch, signal.SIGKILL, ranks)


def terminate_oneself(*ranks: int, batch: int = 5) -> Signal:
    return Signal(batch, signal.SIGTERM, ranks)
