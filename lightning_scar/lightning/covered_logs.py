"""What a LightningModule logs for batches of missing workers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_scar.lightning import private_logs


class CoveredLogs:
    """Collects what is logged for batches of missing workers, and adds it to what is logged for this worker's batch.

    Averages over an epoch count it as other batches. With ``sync_dist=True`` a step's value is reduced over the batches
    of all workers, the missing ones included. Under gradient accumulation the mean of a missing worker's batches stands
    for the last one.

    Args:
        trainer: The trainer.

    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._collected: list[tuple[dict[str, Any], float]] = []

    @contextmanager
    def collecting(self, share: float) -> Iterator[None]:
        """Keep apart what is logged.

        Args:
            share: The share of a whole batch that it is computed of; with 0 it is discarded.

        """
        with private_logs.apart(self._trainer) as results:
            yield
        if share:
            self._collected.append((results, share))

    @contextmanager
    def counted(self, scale: float) -> Iterator[None]:
        """Add what was collected to what is logged in this context.

        Args:
            scale: The share of workers that are present.

        """
        collected, self._collected = self._collected, []

        def change(key: str, reduction: str, value: Tensor) -> Tensor:
            for results, share in collected:
                if key not in results or (other := private_logs.step_value(results[key])) is None:
                    continue
                match reduction:
                    case "max":
                        value = torch.maximum(value, other)
                    case "min":
                        value = torch.minimum(value, other)
                    case _:
                        value = value + other * (share / self._trainer.accumulate_grad_batches)
            return value * scale if reduction == "mean" else value

        with private_logs.before_sync(self._trainer, change):
            yield
        for results, share in collected:
            for key, metric in results.items():
                private_logs.add_to_epoch(self._trainer, key, metric, share)
