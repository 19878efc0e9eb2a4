"""A training on a device that is late, and what its saves write."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from core_helpers import Training, drain
from torch import nn
from torch.optim import Optimizer

from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings
from lightning_scar.core.skeleton import unpack
from lightning_scar.core.skeletons import is_skeleton
from lightning_scar.storage.delta_file import read_delta
from lightning_scar.storage.directory import Directory

#: The step of each save, and what its file holds: exact blocks, refresh, skeleton.
Saves = dict[int, dict[str, Any]]


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
                state["step"] = parameter.new_zeros((), dtype=torch.float32)
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


def saved(folder: Path, device: Device, **settings: Any) -> Saves:
    """Trains for some steps, each saved as the callback does it; returns what was written."""
    with device.training():
        training = LateTraining(device)
        options = {"fraction": 0.5, "block_size": 128, **settings}
        with RunningCheckpoint(folder, Settings(**options)) as running:
            found = _written(running, folder)
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
                if step == 1:
                    # From now on it is known which moments are never negative.
                    drain(running)
            training.step()
    return found


def _written(running: RunningCheckpoint, folder: Path) -> Saves:
    """What is in every delta when it has been written; later ones make some superfluous."""
    found: Saves = {}
    commit = running.store.commit

    def watched(head: Any, *parts: Any) -> Any:
        result = commit(head, *parts)
        [path] = folder.glob(f"rank-0000/delta-*-{head.sequence:08}.safetensors")
        found[head.step] = _content(folder, path)
        return result

    running.store.commit = watched
    return found


def _content(folder: Path, path: Path) -> dict[str, Any]:
    data = memoryview(path.read_bytes())
    delta = read_delta(Directory(str(folder)), str(path.relative_to(folder)))
    found: dict[str, Any] = {"info": {**delta.head.info}}
    for block in delta.blocks:
        for slot, entry in block.slots.items():
            content = data[entry.start : entry.stop]
            # Two pickles of equal objects need not have the same bytes.
            is_pickle = is_skeleton(block.key) and slot == "bytes"
            found[f"{block.key} {slot}"] = unpack(content, True)["skeleton"] if is_pickle else bytes(content)
    for refresh in delta.refreshes:
        found[f"refresh of {refresh.group}"] = refresh.spans, refresh.bases
        for slot, (codec, *entries) in refresh.slots.items():
            found[f"refresh of {refresh.group} {slot}"] = codec, [bytes(data[e.start : e.stop]) for e in entries]
    return found
