"""What the examples train with Lightning: a small CNN on 5,000 handwritten digits of MNIST."""

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from images import DigitNet, digit_sets

Batch = tuple[Tensor, Tensor]


class Digits(LightningDataModule):
    """Every tenth digit is held out; the rest is for training.

    The training loader is stateful, so that a resumed run continues with the batch where it stopped.

    Args:
        batch_size: Digits in a training batch.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    @override
    def setup(self, stage: str) -> None:
        self.train, self.held_out = digit_sets()

    @override
    def train_dataloader(self) -> StatefulDataLoader[Batch]:
        return StatefulDataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=True)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.held_out, batch_size=len(self.held_out))  # type: ignore[arg-type]


class DigitClassifier(LightningModule):
    """Two convolutions and two linear layers, trained with Adam.

    Args:
        learning_rate: Adam's learning rate.
        width: Channels of the first convolution; the second has twice as many.
    """

    def __init__(self, learning_rate: float = 1e-3, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.layers = DigitNet(width).layers

    @override
    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)  # type: ignore[no-any-return]

    @override
    def training_step(self, batch: Batch) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Batch) -> None:
        images, labels = batch
        logits = self(images)
        self.log("val_loss", cross_entropy(logits, labels))
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean(), prog_bar=True)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)
