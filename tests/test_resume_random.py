"""Random numbers of a resumed run are those that it would have drawn: dropout, augmentation, orders of later epochs."""

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import BATCH_SIZE, TinyModel, assert_same, cut_short, fit, saver
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

EXACT = {"fraction": 1.0, "full_every_n_saves": 1}


class Augmented(Dataset[Any]):
    """Adds noise of every kind to what it gives."""

    def __len__(self) -> int:
        return 8 * BATCH_SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(8) + random.random() + float(np.random.rand())
        return torch.full((8,), float(index)) + noise, torch.ones(1)


class Noisy(TinyModel):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 1))

    def on_fit_start(self) -> None:
        # Each process begins with other numbers.
        torch.manual_seed(self.seed)
        random.seed(self.seed)
        np.random.seed(self.seed)


VALIDATED: dict[str, dict[str, Any]] = {
    "without a validation": {"limit_val_batches": 0},
    "with one each epoch": {},
    "with one within": {"val_check_interval": 3},
}


class Loaders(pl.LightningDataModule):
    """Nothing of it has a seed or a state."""

    def train_dataloader(self) -> Any:
        return DataLoader(Augmented(), batch_size=BATCH_SIZE, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Augmented(), batch_size=16)


@pytest.mark.parametrize("validated", VALIDATED)
@pytest.mark.parametrize("after", [3, 8, *(pytest.param(slow, marks=pytest.mark.slow) for slow in (5, 11))])
def test_random_numbers_go_on(after: int, validated: str, tmp_path: Path) -> None:
    def run(folder: str, seed: int, after: int | None = None) -> TinyModel:
        options: dict[str, Any] = {"max_epochs": 3, "data": Loaders(), **VALIDATED[validated]}
        scar, model = saver(tmp_path / folder, **EXACT), Noisy(seed)
        if after is None:
            return fit(scar, model=model, **options)
        return cut_short(scar, model=model, after=after, **options)

    whole = run("whole", seed=1)
    first, second = run("cut", seed=1, after=after), run("cut", seed=2)
    assert first.seen + second.seen == whole.seen
    assert_same(second.final["state_dict"], whole.final["state_dict"])
