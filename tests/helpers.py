"""Small models, Trainers, and the truth to compare a running checkpoint with."""

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lived import Saved, assert_as_lived, at
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_scar import SCARCheckpoint
from lightning_scar.core.blocks import rows
from lightning_scar.core.selection import Candidates, distance
from lightning_scar.lightning import private

BATCHES = 8
BATCH_SIZE = 4
ADAM = partial(Adam, lr=0.01)


def samples(batches: int = BATCHES) -> TensorDataset:
    """Data that are the same in every process."""
    generator = torch.Generator().manual_seed(0)
    count = batches * BATCH_SIZE
    return TensorDataset(torch.randn(count, 8, generator=generator), torch.randn(count, 1, generator=generator))


def loader(batches: int = BATCHES, **options: Any) -> DataLoader[Any]:
    return DataLoader(samples(batches), batch_size=BATCH_SIZE, **options)


class Stream(IterableDataset[Any]):
    """Knows its place, but not its length."""

    def __init__(self) -> None:
        self.done = 0

    def __iter__(self) -> Iterator[Any]:
        data = samples()
        for i in range(self.done, BATCHES * BATCH_SIZE):
            self.done = i + 1
            yield data[i]
        self.done = 0

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


class TinyModel(pl.LightningModule):
    """Remembers, for every optimizer step, the checkpoint dict as it was when the batch was over."""

    def __init__(self, width: int = 32, optimizer: Callable[..., Optimizer] = ADAM) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 1))
        self.make_optimizer = optimizer
        self.live: dict[int, dict[str, Any]] = {}
        self.seen: list[tuple[int, float]] = []
        self.final: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self.seen.append((self.current_epoch, float(batch[0].sum())))
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())

    def steps_done(self) -> int:
        return self.trainer.global_step

    def on_train_batch_end(self, *args: Any) -> None:
        # Lightning calls this after the callbacks' hooks of the same name: nothing changes behind it.
        if self.steps_done() not in self.live:
            self.live[self.steps_done()] = copy.deepcopy(private.dump_checkpoint(self.trainer))

    def on_train_end(self) -> None:
        self.final = copy.deepcopy(private.dump_checkpoint(self.trainer))


class WithABody(TinyModel):
    """Calls ``body`` what the other models call ``net``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = self.net
        del self.net

    def forward(self, x: Any) -> Any:
        return self.body(x)


class Stopped(Exception):
    """The end of a run that is cut short."""


class StopAfter(Callback):
    """Cuts the run short before the batch with this number, as a crash would."""

    def __init__(self, batches: int, error: BaseException | None = None) -> None:
        self.batches = batches
        self.error = error or Stopped()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        # Not steps: Lightning does not count those of raw optimizers.
        if trainer.fit_loop.epoch_loop.batch_progress.total.completed >= self.batches:
            raise self.error


class WrittenTogether(Callback):
    """Begins no batch before all ranks have written: no save is skipped, and who fails first ends none in mid-write."""

    def __init__(self, scar: SCARCheckpoint) -> None:
        self.scar = scar

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.scar._running.flush()  # type: ignore[union-attr]
        trainer.strategy.barrier()


class StopBeforeTheSave(Callback):
    """Cuts the run short when the batch with this number is over, before it is saved: so after the newest save a step
    was made."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed >= self.batches:
            raise Stopped


def make_trainer(*callbacks: Callback, **options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **{"devices": 1, **quiet, **options})


def fit(
    scar: SCARCheckpoint, *callbacks: Callback, model: TinyModel | None = None, data: Any = None, **options: Any
) -> TinyModel:
    """Trains for two epochs, or what ``options`` say."""
    model = model or TinyModel()
    ckpt_path = options.pop("ckpt_path", None)
    trainer = make_trainer(scar, *callbacks, **{"max_epochs": 2, **options})
    trainer.fit(model, data if data is not None else loader(), ckpt_path=ckpt_path)
    return model


def cut_short(
    scar: SCARCheckpoint, *callbacks: Callback, after: int, model: TinyModel | None = None, **options: Any
) -> TinyModel:
    """Trains for so many batches and dies there."""
    model = model or TinyModel()
    try:
        fit(scar, *callbacks, StopAfter(after), model=model, **options)
    except Stopped:
        return model
    raise AssertionError(f"the run ended before batch {after}")


def saver(dirpath: Any, **options: Any) -> SCARCheckpoint:
    """Saves at every step, and not when the run is cut short."""
    every = {} if {"train_time_interval", "max_overhead"} & options.keys() else {"every_n_train_steps": 1}
    return SCARCheckpoint(dirpath, **{**every, "save_on_exception": False, **options})


def slow_distance(candidates: Candidates) -> Tensor:
    """The policy ``distance``, so slow that what is staged lazily is still being staged when the forward is over."""
    time.sleep(0.02)
    return distance(candidates)


def assert_blocks_as_lived(dirpath: Any, live: dict[int, dict[str, Any]]) -> set[int]:
    """Every block is what the live state was at the steps that the block claims; returns those of the bases."""
    return {step for step, _ in assert_as_lived(dirpath, lived_in(live))}


def lived_in(live: dict[int, dict[str, Any]]) -> Callable[[Saved, int], Tensor]:
    """How to look a block up in what a model remembers."""
    return lambda saved, step: rows(at(live[step], saved.path))[saved.span]


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Nested values equal bit for bit."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor), path
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, f"{path}: {a!r} {b!r}"


def files(dirpath: Path) -> list[str]:
    return sorted(str(path.relative_to(dirpath)) for path in dirpath.rglob("*") if path.is_file())
