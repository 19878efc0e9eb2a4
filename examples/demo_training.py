"""The training that the demo kills: it writes one line a step, and may kill itself after a given step."""

import argparse
import csv
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from torch.nn.functional import cross_entropy
from typing_extensions import override

from digits import DigitClassifier, Digits
from lightning_scar import SCARCheckpoint


class Line(NamedTuple):
    """The state after a step; the first line of a process is the state that it starts from."""

    step: int
    train_loss: float
    held_out_loss: float
    bytes_written: int


class Journal(Callback):
    """Writes a :class:`Line` for every step, and kills the process after one of them.

    Args:
        path: The file; a restarted process appends to it.
        checkpoint: Whose bytes are counted.
        kill_after: The step after which the process kills itself with SIGKILL.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint, kill_after: int | None) -> None:
        self.path = path
        self.checkpoint = checkpoint
        self.kill_after = kill_after

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, float("nan"))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._write(trainer, pl_module, float(outputs["loss"]))
        if trainer.global_step == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def _write(self, trainer: Trainer, module: LightningModule, train_loss: float) -> None:
        line = Line(trainer.global_step, train_loss, held_out_loss(trainer, module), self._bytes_written())
        with self.path.open("a", newline="") as file:  # closed, so that no kill loses it
            csv.writer(file).writerow(line)

    def _bytes_written(self) -> int:
        if isinstance(self.checkpoint, SCARCheckpoint):
            return self.checkpoint.stats.bytes_written
        return sum(file.stat().st_size for file in self.path.parent.rglob("*.ckpt") if not file.is_symlink())


def held_out_loss(trainer: Trainer, module: LightningModule) -> float:
    """The loss on 250 digits that are held out, always the same."""
    images, labels = trainer.datamodule.held_out[::2]  # type: ignore[attr-defined]
    with torch.no_grad():
        return float(cross_entropy(module(images), labels))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("callback", choices=["SCARCheckpoint", "ModelCheckpoint"])
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--every", type=int, required=True, help="save every so many steps")
    arguments.add_argument("--steps", type=int, required=True, help="end after so many steps")
    arguments.add_argument("--kill-after", type=int, help="kill the process after this step")
    options = arguments.parse_args()

    folder: Path = options.folder
    checkpoint: Checkpoint
    if options.callback == "SCARCheckpoint":
        checkpoint = SCARCheckpoint(folder / "saved", every_n_train_steps=options.every, fraction=1 / 8)
    else:
        # All files are kept, so that their bytes can be counted; "last" costs none, it is a link.
        checkpoint = ModelCheckpoint(
            folder / "saved", every_n_train_steps=options.every, save_top_k=-1, save_last="link"
        )

    torch.set_num_threads(1)  # so that two runs side by side take the same steps on any machine
    seed_everything(1, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoint, Journal(folder / "journal.csv", checkpoint, options.kill_after)],
    )
    restarted = (folder / "saved" / "last.ckpt").exists()
    # So small a learning rate that the loss still falls at the kill: otherwise lost steps would not show.
    model = DigitClassifier(learning_rate=3e-5)
    trainer.fit(model, datamodule=Digits(batch_size=128), ckpt_path="last" if restarted else None)


if __name__ == "__main__":
    main()
