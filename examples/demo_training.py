"""The training that the demo kills: it writes one line per step, and may kill itself halfway between two saves."""

import argparse
import csv
import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import override

from digits import DigitClassifier, Digits
from lightning_scar import SCARCheckpoint

#: Steps that are made after the loss is regained.
STEPS_AFTER = 40


class Line(NamedTuple):
    """The state after a step; the first line of a process is the state that it starts from.

    Attributes:
        step: The optimizer step.
        clock: Seconds, from an arbitrary origin.
        held_out_loss: The loss on held-out digits.
        begun: The number of saves that have begun.
        written: The number of saves that are written.
    """

    step: int
    clock: float
    held_out_loss: float
    begun: int
    written: int


class Saver(Protocol):
    """Tells how many saves have begun and how many are written."""

    def counts(self) -> tuple[int, int]: ...


class CountingIO(TorchCheckpointIO):
    """Lightning's default way to write checkpoints; it counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = self.written = 0

    @override
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.begun += 1
        super().save_checkpoint(*args, **kwargs)
        self.written += 1

    def counts(self) -> tuple[int, int]:
        return self.begun, self.written


class SCARSaver(SCARCheckpoint):
    """SCARCheckpoint with its defaults; it tells its counts."""

    def counts(self) -> tuple[int, int]:
        running, saves = self._running, self.stats.saves
        if running is None:
            return saves, saves
        return saves + (running._save is not None), saves - running._writer.depth


class Journal(Callback):
    """Writes a :class:`Line` for every step, and ends the training when the loss is regained.

    Args:
        path: The file; a restarted process appends to it.
        saver: Whose saves are counted.
        kill_from: The process kills itself with SIGKILL halfway after the first save from this step on.
        goal: The training ends some steps after the held-out loss has fallen to this.
    """

    def __init__(self, path: Path, saver: Saver, kill_from: int | None, goal: float | None) -> None:
        self.path = path
        self.saver = saver
        self.kill_from = kill_from
        self.goal = goal
        self._saves: list[int] = []
        self._left: int | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begun = self.saver.counts()[0]
        self._write(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        line = self._write(trainer, pl_module)
        if line.begun > self._begun:
            # Checkpoint callbacks run after this one, so their last save is after the previous step.
            self._begun = line.begun
            self._saves.append(line.step - 1)
        if self.kill_from is not None and self._is_half_way(line.step, self.kill_from):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.goal is not None and self._left is None and line.held_out_loss <= self.goal:
            self._left = STEPS_AFTER
        elif self._left is not None:
            self._left -= 1
            trainer.should_stop = self._left <= 0

    def _is_half_way(self, step: int, kill_from: int) -> bool:
        before, last = [0, 0, *self._saves][-2:]
        return last >= kill_from and 2 * (step - last) >= last - before

    def _write(self, trainer: Trainer, module: LightningModule) -> Line:
        loss = held_out_loss(trainer, module)
        line = Line(trainer.global_step, time.monotonic(), loss, *self.saver.counts())
        with self.path.open("a", newline="") as file:  # closed, so that no kill loses it
            csv.writer(file).writerow(line)
        return line


def held_out_loss(trainer: Trainer, module: LightningModule) -> float:
    """Return the loss on 50 held-out digits, always the same."""
    images, labels = trainer.datamodule.held_out[::10]  # type: ignore[attr-defined]
    with torch.no_grad():
        return float(cross_entropy(module(images), labels))


class Perceptron(DigitClassifier):
    """Three linear layers of 1.9 million parameters: with Adam 22 MB of state, more than the small CNN has."""

    def __init__(self) -> None:
        # A learning rate so small that the loss still falls at the kill; otherwise lost steps would not show.
        super().__init__(learning_rate=1e-5)
        width = 1024
        self.layers = nn.Sequential(
            *(nn.Flatten(), nn.Linear(784, width), nn.ReLU()),
            *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)),
        )

    @override
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("method", choices=["SCARCheckpoint", "ModelCheckpoint", "AsyncCheckpointIO"])
    arguments.add_argument("folder", type=Path)
    arguments.add_argument(
        "--every", type=int, help="save every N steps; by default SCARCheckpoint chooses the interval"
    )
    arguments.add_argument("--steps", type=int, required=True, help="end after N steps")
    arguments.add_argument("--kill-from", type=int, help="kill the process halfway after a save from this step on")
    arguments.add_argument("--goal", type=float, help="end when the held-out loss has fallen to this")
    options = arguments.parse_args()

    saved = options.folder / "saved"
    checkpoint: Checkpoint
    plugins: list[Any] = []
    if options.method == "SCARCheckpoint":
        checkpoint = scar = SCARSaver(saved, every_n_train_steps=options.every)
        saver: Saver = scar
    else:
        saver = io = CountingIO()
        plugins = [AsyncCheckpointIO(io) if options.method == "AsyncCheckpointIO" else io]
        checkpoint = ModelCheckpoint(saved, every_n_train_steps=options.every)

    torch.set_num_threads(1)  # so that all make the same steps, and saves have their own core
    seed_everything(1, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=plugins,
        callbacks=[checkpoint, Journal(options.folder / "journal.csv", saver, options.kill_from, options.goal)],
    )
    # ModelCheckpoint removes the older file when the newer one is written; a kill may leave both.
    newest = max(saved.glob("*.ckpt"), key=os.path.getmtime, default=None)
    trainer.fit(Perceptron(), datamodule=Digits(batch_size=192), ckpt_path=newest)


if __name__ == "__main__":
    main()
