"""Ways to train in which weights change at unusual moments; each gives a model and what its Trainer needs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from helpers import TinyModel, loader
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR


class WithSchedule(TinyModel):
    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": CosineAnnealingLR(optimizer, 16), "interval": "step"},
        }


class WithBatchNorm(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Linear(64, 1))


class WithRenormalisedEmbedding(TinyModel):
    """The forward pass itself writes to the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8, max_norm=0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(16).view(4, 4)
        return self.net(x + self.embedding(rows).mean(1))


class ChangesItsWeights(TinyModel):
    """Past the version counters, behind every callback's hook of the same name."""

    def on_train_batch_end(self, *args: Any) -> None:
        for parameter in self.parameters():
            parameter.data.mul_(0.999)
        super().on_train_batch_end(*args)


class Alternating(TinyModel):
    """Manual optimization with two optimizers, one of them with a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        loss = self.loss(batch)
        first.zero_grad()
        self.manual_backward(loss)
        first.step()

        def closure() -> Tensor:
            second.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        second.step(closure)

    def configure_optimizers(self) -> list[Optimizer]:
        return [Adam(self.net[0].parameters(), lr=0.01), SGD(self.net[2].parameters(), lr=0.01, momentum=0.9)]


class Raw(Alternating):
    """Optimizers that Lightning neither wraps nor counts."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers(use_pl_optimizer=False):  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def steps_done(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed


class CountsInItsHook(TinyModel):
    """State of both kinds, large and 0-d, that changes behind every callback's hook."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))
        self.register_buffer("batches", torch.tensor(0))

    def on_train_batch_end(self, *args: Any) -> None:
        self.total += 1
        self.batches += 1
        super().on_train_batch_end(*args)


class StepsInItsHook(TinyModel):
    """Manual optimization whose step comes behind every callback's hook; Lightning does not count it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))

    def on_train_batch_end(self, *args: Any) -> None:
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        super().on_train_batch_end(*args)

    def steps_done(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed


class ChangesWeights(Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        for parameter in pl_module.parameters():
            parameter.data.mul_(0.999)


def _half(precision: str) -> dict[str, Any]:
    return {"plugins": [MixedPrecision(precision, "cpu")]}  # type: ignore[arg-type]


Way = Callable[[], tuple[TinyModel, list[Callback], dict[str, Any]]]

ZOO: dict[str, Way] = {
    "Adam": lambda: (TinyModel(), [], {}),
    "fused Adam": lambda: (TinyModel(optimizer=partial(Adam, lr=0.01, fused=True)), [], {}),
    "a schedule": lambda: (WithSchedule(), [], {}),
    "LBFGS": lambda: (TinyModel(width=8, optimizer=partial(LBFGS, lr=0.01, max_iter=3)), [], {}),
    "BatchNorm": lambda: (WithBatchNorm(), [], {}),
    "Embedding(max_norm)": lambda: (WithRenormalisedEmbedding(), [], {}),
    "a module that changes its weights": lambda: (ChangesItsWeights(), [], {}),
    "a module that counts in its hook": lambda: (CountsInItsHook(), [], {}),
    "a callback that changes weights": lambda: (TinyModel(), [ChangesWeights()], {}),
    "weight averaging": lambda: (TinyModel(), [EMAWeightAveraging(decay=0.9)], {"val_check_interval": 3}),
    "accumulated gradients": lambda: (WithBatchNorm(), [], {"accumulate_grad_batches": 2}),
    "two optimizers by hand": lambda: (Alternating(), [], {}),
    "raw optimizers": lambda: (Raw(), [], {}),
    "16-mixed": lambda: (TinyModel(), [], _half("16-mixed")),
    "bf16-mixed": lambda: (TinyModel(), [], _half("bf16-mixed")),
}


class WithValidation(pl.LightningDataModule):
    def __init__(self, make: Callable[..., Any] = loader) -> None:
        super().__init__()
        self.make = make

    def train_dataloader(self) -> Any:
        return self.make()

    def val_dataloader(self) -> Any:
        return loader(2)
