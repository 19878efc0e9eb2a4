"""Train on MNIST digits on three CPU ranks, kill one, and see the others continue with its replacement.

python examples/survive.py                        # SIGKILL for rank 0 in step 20; the others compute its batches, too
python examples/survive.py --on-failure shrink    # meanwhile steps have two batches instead of three
python examples/survive.py --on-failure buffer    # meanwhile weights are frozen and gradients are collected
"""

import os
import signal
from argparse import ArgumentParser
from typing import Any

from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from digits import DigitClassifier, Digits
from lightning_scar import SCARDDPStrategy


class KillOnce(Callback):
    """Kills the process of one rank with SIGKILL."""

    def __init__(self, strategy: SCARDDPStrategy, rank: int, step: int) -> None:
        self.strategy = strategy
        self.rank = rank
        self.step = step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        is_time = trainer.global_step == self.step and not self.strategy.outages
        if is_time and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=3, help="the number of ranks")
    parser.add_argument("--kill", type=int, default=0, help="the rank to kill")
    parser.add_argument("--step", type=int, default=20, help="the step after which it is killed")
    parser.add_argument("--on-failure", default="cover", help="cover, shrink, buffer or wait")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()

    seed_everything(1)
    strategy = SCARDDPStrategy(on_failure=options.on_failure)
    trainer = Trainer(
        accelerator="cpu",
        devices=options.devices,
        strategy=strategy,
        max_epochs=options.epochs,
        callbacks=[KillOnce(strategy, options.kill, options.step)],
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(DigitClassifier(), datamodule=Digits())
    if trainer.is_global_zero:
        print(f"Rank 0 ends at step {trainer.global_step}. Outages: {strategy.outages}")


if __name__ == "__main__":
    main()
