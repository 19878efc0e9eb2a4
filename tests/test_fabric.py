"""Lightning Fabric: ``fabric.save`` and ``load`` with ``SCARCheckpointIO``, and ``SCARLoop`` in its loops."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import prepared
import pytest
import torch
from helpers import BATCH_SIZE, Stopped, assert_same, samples
from lightning.fabric import Fabric
from loop_runs import Net
from torch.utils.data import DataLoader

from lightning_scar import SCARCheckpointIO, SCARLoop, load
from lightning_scar.core.settings import Settings


def set_up(*plugins: Any, precision: Any = "32-true") -> tuple[Fabric, Any, Any]:
    fabric = Fabric(accelerator="cpu", devices=1, plugins=list(plugins), precision=precision)
    fabric.launch()
    model = Net()
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=0.01))
    return fabric, model, optimizer


def step(fabric: Fabric, model: Any, optimizer: Any, x: torch.Tensor) -> None:
    fabric.backward(model(x).square().mean())
    optimizer.step()
    optimizer.zero_grad()


def test_save_and_load(tmp_path: Path) -> None:
    io = SCARCheckpointIO(settings=Settings(fraction=1.0))
    fabric, model, optimizer = set_up(io)
    state = {"model": model, "optimizer": optimizer, "step": 0}
    for i in range(1, 4):
        step(fabric, model, optimizer, torch.ones(2, 8))
        state["step"] = i
        fabric.save(tmp_path / "scar", state)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {key: dict(value) for key, value in optimizer.state_dict()["state"].items()}
    torch.nn.init.zeros_(model.net[0].weight)
    state["step"] = 0
    # What was saved last may still be on its way.
    fabric.load(tmp_path / "scar", state)
    assert state["step"] == 3
    assert_same(dict(model.state_dict()), saved)
    assert_same(optimizer.state_dict()["state"], moments)
    fabric.save(tmp_path / "plain.ckpt", state)
    assert torch.load(tmp_path / "plain.ckpt")["step"] == 3


def test_the_directory_is_given_back_when_the_process_ends(tmp_path: Path) -> None:
    program = (
        "import torch; from lightning.fabric import Fabric; from lightning_scar import SCARCheckpointIO; "
        "fabric = Fabric(accelerator='cpu', devices=1, plugins=[SCARCheckpointIO()]); fabric.launch(); "
        f"fabric.save({str(tmp_path / 'scar')!r}, {{'model': fabric.setup(torch.nn.Linear(2, 1)), 'step': 4}})"
    )
    prepared.run([sys.executable, "-c", program], check=True, timeout=100)
    assert load(tmp_path / "scar")["step"] == 4
    assert not (tmp_path / "scar" / "lease.json").exists()


def train(dirpath: Path, after: int | None = None, precision: Any = "32-true") -> dict[str, Any]:
    fabric, model, optimizer = set_up(precision=precision)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    loader = fabric.setup_dataloaders(DataLoader(samples(), batch_size=BATCH_SIZE))
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    options: dict[str, Any] = {"every_n_steps": 1, "fraction": 1.0, "full_every_n_saves": 1}
    with contextlib.suppress(Stopped), SCARLoop(dirpath, state, **options, save_on_exception=False) as scar:
        scar.resume()
        for x, _ in scar.batches(loader):
            if scar.batches_done == after:
                raise Stopped
            step(fabric, model, optimizer, x)
            schedule.step()
            scar.step()
    return scar.state.dump()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_loop_ends_as_an_uninterrupted_one(tmp_path: Path, precision: str) -> None:
    whole = train(tmp_path / "whole", precision=precision)
    train(tmp_path / "cut", after=3, precision=precision)
    resumed = train(tmp_path / "cut", precision=precision)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_same(resumed[part], whole[part])
    assert list(whole["state_dict"]) == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
