"""Random numbers of a resumed run are those that it would have drawn: dropout, augmentation, orders of later epochs."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import BATCH_SIZE, Stopped, TinyModel, assert_same, cut_short, fit, saver
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


def test_random_numbers_of_workers_go_on_in_the_next_epoch(tmp_path: Path) -> None:
    def run(folder: str, seed: int, after: int | None = None) -> list[tuple[int, float]]:
        options: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 0}
        options["data"] = DataLoader(Augmented(), batch_size=BATCH_SIZE, num_workers=1)
        scar, model = saver(tmp_path / folder, **EXACT), Noisy(seed)
        done = cut_short(scar, model=model, after=after, **options) if after else fit(scar, model=model, **options)
        return done.seen

    whole = run("whole", seed=1)
    first, second = run("cut", seed=1, after=3), run("cut", seed=2)
    assert len(first + second) == len(whole)
    assert second[-8:] == whole[-8:]


#: Where an error comes, behind numbers that are drawn again: in a batch, and where the next one begins.
HOOKS = ["training_step", "validation_step", "on_train_batch_start", "on_train_epoch_end", "on_train_epoch_start"]


class Fails(Noisy):
    """Draws, and fails, in one of the hooks, at its second time or later."""

    def __init__(self, seed: int, hook: str, at: int) -> None:
        super().__init__(seed)
        inner, times = getattr(self, hook), iter(range(100))

        def failing(*args: Any) -> Any:
            torch.rand(1)
            if next(times) == at:
                self.end()
            return inner(*args)

        setattr(self, hook, failing)

    def end(self) -> None:
        if not self.trainer.validating:
            raise Stopped
        # In a validation, only a signal brings a save.
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("accumulated", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("hook", [*HOOKS[:2], *(pytest.param(hook, marks=pytest.mark.slow) for hook in HOOKS[2:])])
@pytest.mark.parametrize("at", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_random_numbers_go_on_behind_an_error(hook: str, at: int, accumulated: int, tmp_path: Path) -> None:
    def run(folder: str, seed: int, at: int) -> TinyModel:
        scar, model = saver(tmp_path / folder, every_n_train_steps=1000, save_on_exception=True), Fails(seed, hook, at)
        options: dict[str, Any] = {"max_epochs": 4, "data": Loaders(), "accumulate_grad_batches": accumulated}
        fit(scar, model=model, num_sanity_val_steps=0, **options)
        return model

    whole = run("whole", seed=1, at=-1)
    with pytest.raises((Stopped, SystemExit)):
        run("cut", seed=1, at=at * (8 + 3) if hook in ("training_step", "on_train_batch_start") else at)
    assert_same(run("cut", seed=2, at=-1).final["state_dict"], whole.final["state_dict"])
