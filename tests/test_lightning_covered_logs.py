"""What is logged for batches of missing workers counts as if they were there."""

from typing import Any

import lightning.pytorch as pl
import torch
from helpers import TinyModel, loader, make_trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from lightning_scar.lightning import private_logs
from lightning_scar.lightning.covered_logs import CoveredLogs

#: What this worker has, and those of which it computes the batches.
OWN, MISSING = 1.0, (5.0, 8.0)


class Logs(TinyModel):
    """Logs a number in each way."""

    number = OWN

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for name in ("mean", "sum", "max", "min"):
            value = torch.tensor(self.number)
            self.log(name, value, on_step=True, on_epoch=True, sync_dist=True, reduce_fx=name, batch_size=2)
        self.log("alone", torch.tensor(self.number), on_step=True, on_epoch=True, batch_size=2)
        return super().training_step(batch, batch_idx)


class Covers(Callback):
    """Computes other batches in the second step, as a survivor does that is one of two, of four workers."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != 1:
            return
        logs = CoveredLogs(trainer)
        for number in MISSING:
            pl_module.number = number
            with logs.collecting(1.0):
                pl_module._current_fx_name = "training_step"
                pl_module.training_step(batch, batch_idx)
        with logs.collecting(0):
            pl_module.training_step(batch, batch_idx)
        pl_module.number = OWN
        self.context = logs.counted(0.5)
        self.context.__enter__()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if args[-1] == 1:
            self.context.__exit__(None, None, None)
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Repeats(Callback):
    """Makes the batches of a step once more, as after a failure."""

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        undo = private_logs.kept(trainer)
        pl_module._current_fx_name = "training_step"
        pl_module.number = 100.0
        pl_module.training_step(batch, batch_idx)
        pl_module.number = OWN
        undo()


def test_what_is_logged_in_an_attempt_that_failed_does_not_count() -> None:
    trainer = make_trainer(Repeats(), max_epochs=1, limit_train_batches=2, enable_checkpointing=False)
    trainer.fit(Logs(), loader())
    epoch = {name.removesuffix("_epoch"): float(v) for name, v in trainer.callback_metrics.items() if "_epoch" in name}
    assert epoch == {"mean": OWN, "alone": OWN, "sum": 2 * OWN, "max": OWN, "min": OWN}


def test_it_counts_in_the_step_and_in_the_epoch() -> None:
    covers = Covers()
    trainer = make_trainer(covers, max_epochs=1, limit_train_batches=2, enable_checkpointing=False, strategy="ddp")
    trainer.fit(Logs(), loader())
    step = {name.removesuffix("_step"): value for name, value in covers.steps[1].items() if name.endswith("_step")}
    total = OWN + sum(MISSING)
    # The other survivor would add its part to the mean, and halve it.
    assert step == {"mean": total / 2, "sum": total, "max": 8, "min": 1, "alone": OWN}
    numbers = [OWN, OWN, *MISSING]
    epoch = {name.removesuffix("_epoch"): float(v) for name, v in trainer.callback_metrics.items() if "_epoch" in name}
    assert epoch == {"mean": sum(numbers) / 4, "alone": sum(numbers) / 4, "sum": sum(numbers), "max": 8, "min": 1}
