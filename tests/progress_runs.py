"""A training in which all that Lightning counts is seen, and whose process dies at a chosen place."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from ddp_runs import launched_by_torchrun
from helpers import BATCH_SIZE, BATCHES, TinyModel, WrittenTogether, loader, make_trainer, samples, saver
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import MeanSquaredError, SpearmanCorrCoef


class Killed(BaseException):
    """The end of a process."""


class Model(TinyModel):
    """With dropout, schedules of every kind, and metrics that an epoch gathers."""

    def __init__(self, monitor: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 1))
        self.error = MeanSquaredError()
        # Its state are lists of tensors.
        self.ranks = SpearmanCorrCoef()
        self.monitor = monitor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        outputs = self(batch[0])
        self.error(outputs, batch[1])
        self.ranks(outputs.flatten(), batch[1].flatten())
        # Of all ranks, which must agree on their rates.
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("largest", loss, reduce_fx="max", on_step=False, on_epoch=True, sync_dist=True)
        self.log("error", self.error, on_step=False, on_epoch=True)
        self.log("ranks", self.ranks, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("v", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        # Of one optimizer all, so that each can be seen by itself only in its own state.
        optimizer = SGD(self.parameters(), lr=0.05, momentum=0.9)
        plateau = partial(ReduceLROnPlateau, optimizer, patience=0, factor=0.9, threshold=0.3)
        return [optimizer], [
            {"scheduler": StepLR(optimizer, 1, 0.9), "interval": "epoch"},
            {"scheduler": LinearLR(optimizer, 1.0, 0.5, 40), "interval": "step"},
            {"scheduler": plateau(), "interval": "epoch", "monitor": self.monitor},
            {"scheduler": plateau(), "interval": "step", "monitor": "loss"},
        ]

    def on_train_batch_end(self, *args: Any) -> None:
        pass


class Diary(Callback):
    """Which hooks were called, over all processes of a run: it is part of the checkpoint."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {"lines": list(self.lines)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lines = list(state["lines"])

    def _write(self, hook: str, trainer: pl.Trainer) -> None:
        if not trainer.sanity_checking:
            metrics = {name: round(float(value), 5) for name, value in trainer.callback_metrics.items()}
            self.lines.append(f"{hook} {trainer.current_epoch} {trainer.global_step} {metrics}")


for _hook in (
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
):
    setattr(Diary, _hook, lambda self, trainer, *args, _hook=_hook: self._write(_hook, trainer))


class Dies(Callback):
    """Ends the process in a hook of an epoch's end, once for each step given."""

    def __init__(self, hook: str, steps: list[int], error: type[BaseException] = Killed) -> None:
        def die(trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step in steps and not trainer.sanity_checking:
                steps.remove(trainer.global_step)
                raise error

        setattr(self, hook, die)


class Together(WrittenTogether):
    """Nor a validation, nor the end of an epoch."""

    def on_validation_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.on_train_batch_start(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.on_train_batch_start(trainer)


def _data(trainer: pl.Trainer) -> Any:
    data = samples(BATCHES * trainer.world_size)
    sampler = DistributedSampler(data, trainer.world_size, trainer.global_rank)
    return StatefulDataLoader(data, batch_size=BATCH_SIZE, sampler=sampler)


WAYS: dict[str, dict[str, Any]] = {
    "a validation each epoch": {"max_epochs": 4},
    "within an epoch": {"max_epochs": 4, "val_check_interval": 4},
    "within an epoch, not at its end": {"max_epochs": 4, "val_check_interval": 3},
    "every second epoch": {"max_epochs": 4, "check_val_every_n_epoch": 2},
    "across epochs": {"max_epochs": 4, "check_val_every_n_epoch": None, "val_check_interval": 5},
    "no validation": {"max_epochs": 4, "limit_val_batches": 0},
    "max_steps": {"max_steps": 32, "max_epochs": -1},
    "max_steps without validation": {"max_steps": 32, "max_epochs": -1, "limit_val_batches": 0},
    "accumulated": {"max_epochs": 4, "accumulate_grad_batches": 3},
    "few batches": {"max_epochs": 4, "limit_train_batches": 6},
}


def _monitor(way: str) -> str:
    return "largest" if way in ("every second epoch", "no validation", "max_steps without validation") else "v"


def run(way: str, folder: Path, *dies: Callback, more: Any = None, **options: Any) -> dict[str, Any]:
    """One process of a run; what must be at its end as in an undisturbed one.

    Args:
        way: One of :data:`WAYS`.
        folder: Where all processes of the run save.
        dies: How it ends.
        more: More options of the Trainer.
        options: Those of ``SCARCheckpoint``.
    """
    monitor = "largest" if way in ("every second epoch", "no validation", "max_steps without validation") else "v"
    model = Model(monitor)
    stops = EarlyStopping(monitor, patience=100, min_delta=0.05)
    best = ModelCheckpoint(folder / "best", monitor=monitor, save_top_k=2, save_last=True)
    diary = Diary()
    scar = saver(folder / "scar", fraction=1.0, full_every_n_saves=1, **options)
    trainer = make_trainer(diary, stops, best, scar, Together(scar), *dies, **{**WAYS[way], **(more or {})})
    # Each process begins with random numbers of its own rank.
    torch.manual_seed(trainer.global_rank)
    trainer.fit(model, _data(trainer), loader(3))
    # Of its present score Lightning keeps nothing.
    kept = ("best_model_score", "kth_value")
    loop = model.final["loops"]["fit_loop"]
    counts = ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.state_dict", "epoch_loop.scheduler_progress")
    return {
        "lines": diary.lines,
        "EarlyStopping": stops.state_dict(),
        "ModelCheckpoint": {name: best.state_dict()[name] for name in kept},
        "files": sorted(path.name for path in (folder / "best").iterdir()),
        "loops": {name: loop[name] for name in counts},
        **{name: model.final[name] for name in ("global_step", "epoch", "lr_schedulers", "state_dict")},
        "optimizer_states": model.final["optimizer_states"],
    }


def run_rank(rank: int, way: str, folder: Path, hook: str, times: list[int]) -> list[dict[str, Any]]:
    """Two runs as one of the ranks of the default group: an undisturbed one, and one whose processes die at steps."""
    launched = launched_by_torchrun(rank)
    whole = run(way, folder / "whole", more=launched)
    left = list(times)
    for _ in times:
        try:
            run(way, folder / "cut", Dies(hook, left), more=launched)
        except Killed:
            continue
        raise AssertionError("it came to its end")
    return [whole, run(way, folder / "cut", more=launched)]
