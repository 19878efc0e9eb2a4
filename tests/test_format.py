"""docs/format.md is enough to read a running checkpoint: a reader that knows no more than that agrees with ours."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy_reader import read
from torch import nn, optim

from lightning_scar import load
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings
from lightning_scar.core.skeletons import is_skeleton

OPTIMIZERS = {
    "Adam": lambda parameters: optim.Adam(parameters, lr=1e-2),
    "momentum": lambda parameters: optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "SGD": lambda parameters: optim.SGD(parameters, lr=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_reader_of_eighty_lines_of_numpy_finds_what_load_finds(tmp_path: Path, optimizer: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 37), nn.BatchNorm1d(37), nn.ReLU(), nn.Linear(37, 300))
    trained = OPTIMIZERS[optimizer](model.parameters())
    with RunningCheckpoint(tmp_path, Settings(block_size=2048)) as running:
        for step in range(1, 9):
            trained.zero_grad()
            model(torch.randn(16, 50)).square().mean().backward()
            trained.step()
            checkpoint = {"state_dict": model.state_dict(), "optimizer_states": [trained.state_dict()]}
            parts = {"optimizers": {("optimizer_states", 0): trained}, "parameters": model.parameters()}
            running.save_now(checkpoint, step, **parts)
            running.flush()
        # As a killed run leaves it: its end would be a full save.
        running.suspend()
        assert_same(read(tmp_path), load(tmp_path))


def assert_same(found: dict[tuple[str, int, int], dict[str, np.ndarray]], loaded: dict[str, object]) -> None:
    names = list(loaded["state_dict"])
    compared = 0
    for (group, first, last), slots in found.items():
        if is_skeleton(group):
            continue
        name = group.removeprefix("state_dict/")
        state = loaded["optimizer_states"][0]["state"]
        parameters = [name for name in names if "running" not in name and "num_batches" not in name]
        for slot, values in slots.items():
            whole = loaded["state_dict"][name] if slot == "param" else state[parameters.index(name)][slot]
            assert np.array_equal(values, whole[first:last].numpy()), (group, first, slot)
            compared += values.size
    assert compared > 10_000


def test_the_reader_is_as_short_as_it_says() -> None:
    assert len((Path(__file__).parent / "numpy_reader.py").read_text().splitlines()) <= 80
