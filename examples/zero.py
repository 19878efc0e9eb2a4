"""Train on MNIST digits on two CPU ranks, each with about half of Adam's state (ZeRO), and resume on any number.

python examples/zero.py --steps 50        # stops early
python examples/zero.py                   # resumes, and runs to the end
python examples/zero.py --devices 3       # or on another number of ranks
"""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from digits import Batch, DigitClassifier, Digits
from lightning_scar import SCARCheckpoint


class ShardedDigitClassifier(DigitClassifier):
    """Each rank has Adam's state of some whole parameters only, so here are several of about the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU()),
            *(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)),
        )

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.Adam, lr=self.learning_rate)


class SharedDigits(Digits):
    """Every rank sees its own share, in an order that depends only on the epoch."""

    @override
    def train_dataloader(self) -> StatefulDataLoader[Batch]:
        sampler: DistributedSampler[Batch] = DistributedSampler(self.train)
        return StatefulDataLoader(self.train, batch_size=self.batch_size, sampler=sampler, drop_last=True)


class CutShort(Callback):
    """Ends training as a failure would, so that the next start resumes."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.steps:
            raise SystemExit


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=2, help="the number of ranks")
    parser.add_argument("--steps", type=int, help="stop training early, after N steps")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("runs/zero/scar"))
    options = parser.parse_args()

    seed_everything(1)
    scar = SCARCheckpoint(options.dir, every_n_train_steps=10, fraction=0.125)
    trainer = Trainer(
        accelerator="cpu",
        devices=options.devices,
        strategy="ddp",
        max_epochs=options.epochs,
        callbacks=[scar, *([CutShort(options.steps)] if options.steps else [])],
    )
    try:
        trainer.fit(ShardedDigitClassifier(), datamodule=SharedDigits())
    finally:
        saves, megabytes = scar.stats.saves, scar.stats.bytes_written / 1e6
        print(f"Rank {trainer.global_rank} made {saves} saves, {megabytes:.2f} MB, the last at step {scar.stats.step}.")


if __name__ == "__main__":
    main()
