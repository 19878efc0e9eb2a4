"""A training on a device that is late, and the files that its saves make."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from core_helpers import Training
from torch import nn
from torch.optim import Optimizer

from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings


class Device(Protocol):
    """Where the training runs."""

    def place(self, model: nn.Module) -> None:
        """Brings a model there."""

    def training(self) -> Any:
        """A context for what the training thread does."""

    def settle(self) -> None:
        """Called behind everything that may be late."""


class AtOnce:
    """Nothing is late on this one: what all others must come to."""

    def place(self, model: nn.Module) -> None:
        pass

    @contextmanager
    def training(self) -> Iterator[None]:
        yield

    def settle(self) -> None:
        pass


class Moving(Optimizer):
    """Changes parameters and state in place as Adam does, with a counter on their device, and waits for nothing."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[parameter]
            if not state:
                state["step"] = parameter.new_zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"].add_(1)
            state["exp_avg"].mul_(0.5).add_(parameter.grad)
            state["exp_avg_sq"].mul_(0.5).add_(parameter.grad * parameter.grad)
            parameter.sub_(state["exp_avg"] * 0.125)


class Net(nn.Module):
    """Parameters of several sizes and layouts, a frozen one, and a buffer that the forward changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(24, 30)
        self.half = nn.Linear(40, 20, bias=False).bfloat16()
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(300))


class LateTraining(Training):
    """Its gradients are made on the host and copied to where they belong."""

    def __init__(self, device: Device) -> None:
        model = Net()
        device.place(model)
        super().__init__(model, Moving(model.parameters()))

    @torch.no_grad()
    def forward(self) -> None:
        self.model.mean.add_(1)

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        generator = torch.Generator().manual_seed(self.steps)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                made = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.grad = torch.zeros_like(parameter)
                parameter.grad.copy_(made)
        self.optimizers[0].step()


def saved(folder: Path, device: Device, **settings: Any) -> dict[str, bytes]:
    """Trains for some steps, each saved as the callback does it; returns all files, superfluous ones, too."""
    with device.training():
        training = LateTraining(device)
        options = {"fraction": 0.5, "block_size": 128, **settings}
        with RunningCheckpoint(folder, Settings(**options)) as running:
            files = _files_written(running, folder)
            for step in range(1, 7):
                training.forward()
                training.step()
                device.settle()
                training.begin(running, wait=True, full=step == 5)
                running.stage()
                device.settle()
                # The next batch, beside the staging.
                training.forward()
                running.fence()
                device.settle()
            training.step()
    return files


def _files_written(running: RunningCheckpoint, folder: Path) -> dict[str, bytes]:
    """The content of every file as it is when it has been written; later ones make some superfluous."""
    files: dict[str, bytes] = {}
    commit = running.store.commit

    def watched(*args: Any) -> Any:
        try:
            return commit(*args)
        finally:
            for path in folder.glob("rank-0000/*.safetensors"):
                files.setdefault(path.name, path.read_bytes())

    running.store.commit = watched
    return files
