"""A training with Lightning that makes steps when it has its turn: ``--strategy ddp`` or ``scar_ddp``.

With ``scar_ddp`` it also measures the time of the strategy's own code in each step: the time of its hooks, minus that
of Lightning's DDPStrategy in them.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from benchmarks.gate import Gate, batches, perceptron

#: The hooks in which our strategy does more than Lightning's.
_HOOKS = ("optimizer_step", "on_train_batch_start")


class Same(IterableDataset[Tensor]):
    """The same batch forever, so that data cost nothing.

    Args:
        batch: The batch.

    """

    def __init__(self, batch: Tensor) -> None:
        self._batch = batch

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self._batch


class Perceptron(pl.LightningModule):
    """A perceptron trained with SGD, which has the shortest update.

    Args:
        width: Units of a layer.

    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = perceptron(width)

    @override
    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.layers(batch).square().mean()
        return loss

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class OwnTime:
    """Seconds spent in our hooks since the last ``take``, without those of the class they extend."""

    def __init__(self) -> None:
        self._ours = self._theirs = 0.0

    def measure(self) -> None:
        """Wrap the hooks with clocks."""
        from lightning_scar import SCARDDPStrategy

        for hook in _HOOKS:
            setattr(DDPStrategy, hook, self._timed(getattr(DDPStrategy, hook), ours=False))
            setattr(SCARDDPStrategy, hook, self._timed(getattr(SCARDDPStrategy, hook), ours=True))

    def take(self) -> float:
        """Return the seconds, and start from zero again."""
        own = self._ours - self._theirs
        self._ours = self._theirs = 0.0
        return own

    def _timed(self, hook: Callable[..., Any], ours: bool) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                took = time.perf_counter() - started
                if ours:
                    self._ours += took
                else:
                    self._theirs += took

        return timed


class Turns(Callback):
    """Runs a stretch of steps when it is this group's turn.

    Args:
        gate: The worker's gate.
        own: The clocks; ``None`` for a strategy without any.

    """

    def __init__(self, gate: Gate, own: OwnTime | None) -> None:
        self._gate, self._own = gate, own

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._own is not None:
            self._gate.note(self._own.take())
        self._gate.stepped()
        trainer.should_stop = self._gate.is_over


def main() -> None:
    """Train."""
    flags = argparse.ArgumentParser(description="a training that takes turns with others")
    flags.add_argument("--strategy", choices=("ddp", "scar_ddp"), required=True)
    flags.add_argument("--store", required=True, help="host and port of the store that assigns turns")
    flags.add_argument("--width", type=int, required=True)
    options = flags.parse_args()
    own = None
    if options.strategy == "scar_ddp":
        own = OwnTime()
        own.measure()
    gate = Gate(options.store, options.strategy, int(os.environ["RANK"]))
    pl.seed_everything(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=options.strategy,
        max_epochs=1,
        callbacks=[Turns(gate, own)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Perceptron(options.width), DataLoader(Same(batches(options.width)), batch_size=None))


if __name__ == "__main__":
    main()
