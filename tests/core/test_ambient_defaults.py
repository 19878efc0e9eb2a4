"""Torch's defaults, which a program may set, and Lightning's precision plugins do beside a save, change nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from core_helpers import Training, assert_same
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from lightning_scar.core.restoration import load
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings


@contextmanager
def default(dtype: torch.dtype = torch.float32, device: str = "cpu", deterministic: bool = False) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def training(kind: type[Optimizer]) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Embedding(7, 300))
    return Training(model, kind(model.parameters(), lr=0.01))


def saved(path: Path, ambient: dict[str, Any], kind: type[Optimizer], **options: Any) -> dict[str, Any]:
    """What four saves leave, read back with the same defaults."""
    run = training(kind)
    with default(**ambient):
        running = RunningCheckpoint(path, Settings(fraction=0.25, **options))
    for _ in range(4):
        run.step()
        with default(**ambient):
            run.save(running)
    with default(**ambient):
        running.close()
        checkpoint: dict[str, Any] = load(path)
    return checkpoint


@pytest.mark.parametrize(
    "ambient",
    [
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"device": "meta"},
        {"deterministic": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(("kind", "options"), [(Adam, {}), (SGD, {}), (Adam, {"refresh": None, "policy": "random"})])
def test_a_save_is_the_same(
    tmp_path: Path, ambient: dict[str, Any], kind: type[Optimizer], options: dict[str, Any]
) -> None:
    assert_same(saved(tmp_path / "a", ambient, kind, **options), saved(tmp_path / "b", {}, kind, **options))
