"""What needs a CUDA device: tensors there, and ranks that share one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from core_helpers import Training, assert_same
from ranks import run_ranks
from torch import nn, optim

from lightning_scar import load
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_device(size: int = 256) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size), nn.BatchNorm1d(size), nn.Linear(size, size)).cuda()
    training = Training(model, optim.Adam(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    training.optimizers[0].step()
    return training


def on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    return [on_cpu(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("staging", ["lazy", "eager"])
def test_a_save_holds_the_values_from_before_the_step_that_follows(tmp_path: Path, staging: str) -> None:
    training = on_device()
    with RunningCheckpoint(tmp_path, Settings(fraction=1.0, staging=staging)) as running:
        for _ in range(4):
            training.steps += 1
            expected = on_cpu(training.checkpoint())
            training.begin(running, wait=True)
            running.stage()
            running.fence()
            with torch.no_grad():
                for parameter in training.model.parameters():
                    parameter.mul_(1.5)
    assert_same(load(tmp_path), expected)


def share_a_device(rank: int, folder: Path) -> Any:
    training = on_device()
    with RunningCheckpoint(folder, ranks=Ranks.of_default_group()) as running:
        training.steps = 1
        training.begin(running, wait=True)
        running.fence()
    return on_cpu(training.checkpoint())


def restore_on_device(rank: int, folder: Path) -> Any:
    with RunningCheckpoint(folder, ranks=Ranks.of_default_group()) as running:
        training = on_device()
        training.load(running.restore().checkpoint)
        return on_cpu(training.checkpoint())


def test_ranks_that_share_a_device_save_and_restore(tmp_path: Path) -> None:
    saved = run_ranks(share_a_device, 2, tmp_path)
    for restored in run_ranks(restore_on_device, 2, tmp_path):
        assert_same(restored, saved[0])
