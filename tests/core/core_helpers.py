"""What several tests need."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_scar.core.blocks import Group
from lightning_scar.core.codec import Codec
from lightning_scar.core.restoration import load
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.save import Codes
from lightning_scar.core.settings import Settings
from lightning_scar.core.skeletons import is_skeleton
from lightning_scar.storage.places import open_store


def bits(tensor: Tensor) -> Tensor:
    """A tensor's values as bytes: tells -0.0 from 0.0 and one NaN from another."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()).reshape(-1).view(torch.uint8)


def assert_same(found: Any, expected: Any, place: str = "checkpoint") -> None:
    """Compares nested containers; tensors bit for bit, with dtype, shape and dense layout."""
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor), place
        assert (found.dtype, found.shape, found.layout) == (expected.dtype, expected.shape, expected.layout), place
        if torch.ops.aten.is_non_overlapping_and_dense(expected):
            assert _strides(found) == _strides(expected), place
        assert torch.equal(bits(found), bits(expected)), place
    elif isinstance(expected, dict):
        assert list(found) == list(expected), place
        for key, value in expected.items():
            assert_same(found[key], value, f"{place}/{key}")
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected), place
        assert len(found) == len(expected), place
        for i, value in enumerate(expected):
            assert_same(found[i], value, f"{place}/{i}")
    else:
        assert found == expected, place


def _strides(tensor: Tensor) -> list[int]:
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


class Training:
    """A real training in a few lines: gives a checkpoint dict of references to live tensors, as Lightning does.

    Args:
        model: What is trained.
        optimizers: What trains it.

    """

    def __init__(self, model: nn.Module, *optimizers: Optimizer) -> None:
        self.model = model
        self.optimizers = optimizers
        self.steps = 0

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One step of every optimizer, with gradients that depend on the step only."""
        self.steps += 1
        generator = torch.Generator().manual_seed(self.steps)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        for optimizer in self.optimizers:
            optimizer.step(closure) if closure else optimizer.step()

    def checkpoint(self) -> dict[str, Any]:
        """The checkpoint dict."""
        return {
            "state_dict": self.model.state_dict(),
            "optimizer_states": [optimizer.state_dict() for optimizer in self.optimizers],
            "global_step": self.steps,
        }

    def load(self, checkpoint: dict[str, Any]) -> None:
        """The inverse of :meth:`checkpoint`."""
        self.model.load_state_dict(checkpoint["state_dict"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)
        self.steps = checkpoint["global_step"]

    def begin(self, running: RunningCheckpoint, **options: Any) -> bool:
        """Begins a save of the present state."""
        return running.save(self.checkpoint(), self.steps, **self._options(), **options)

    def save(self, running: RunningCheckpoint, **options: Any) -> None:
        """Saves the present state, and waits until it is on disk."""
        running.save_now(self.checkpoint(), self.steps, **self._options(), **options)
        drain(running)

    def _options(self) -> dict[str, Any]:
        optimizers = {("optimizer_states", i): optimizer for i, optimizer in enumerate(self.optimizers)}
        return {"optimizers": optimizers, "parameters": list(self.model.parameters())}


def drain(running: RunningCheckpoint) -> None:
    """Waits until everything that was handed over is written and remembered."""
    running._writer.drain()


def save_tensors(running: RunningCheckpoint, step: int, **tensors: Tensor) -> None:
    """Saves a checkpoint of these tensors, and waits until it is on disk."""
    running.save_now({"state_dict": tensors}, step)
    drain(running)


def round_trip(url: str | Path, checkpoint: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Saves a checkpoint and loads it."""
    with RunningCheckpoint(url, Settings(**settings)) as running:
        running.save_now(checkpoint, step=1)
    return load(url)


def saved_steps(url: str | Path) -> dict[str, int]:
    """The step of the newest version on disk of every block, by key."""
    store = open_store(url)
    store.refresh()
    keys = [key for key in list(store.index.keys()) if not is_skeleton(key)]
    return {key: store.index.versions(key)[0].block.version.step for key in keys}


def steps_of(url: str | Path, name: str) -> list[int]:
    """The steps of one tensor's blocks on disk, in the order of its rows."""
    steps = {
        rows_of(key).start: step for key, step in saved_steps(url).items() if key.startswith(f"state_dict/{name}[")
    }
    return [step for _, step in sorted(steps.items())]


def written_blocks(url: str | Path, step: int) -> set[str]:
    """The keys of the blocks that the save of one step wrote, as far as their file is still there."""
    store = open_store(url)
    store.refresh()
    found = {b.key for delta in store.deltas for b in delta.blocks if b.version.step == step}
    return {key for key in found if not is_skeleton(key)}


def rows_of(key: str) -> slice:
    """The rows that a block's key names."""
    start, stop = key.rpartition("[")[2].rstrip("]").split(":")
    return slice(int(start), int(stop))


@contextmanager
def writes_held(running: RunningCheckpoint) -> Iterator[None]:
    """A slow disk: nothing is written before the end of the ``with`` block."""
    commit, released = running.store.commit, threading.Event()

    def slow(*args: Any) -> int:
        released.wait()
        return commit(*args)

    running.store.commit = slow
    try:
        yield
    finally:
        running.store.commit = commit
        released.set()


@contextmanager
def writes_failing(directory: Path) -> Iterator[None]:
    """A disk that takes no writes: a file lies where the rank's folder should be."""
    folder, aside = directory / "rank-0000", directory.with_name(f"{directory.name}-aside")
    directory.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.rename(aside)
    folder.write_text("in the way")
    try:
        yield
    finally:
        folder.unlink()
        if aside.exists():
            aside.rename(folder)


def damage(file: Path, needle: bytes) -> None:
    """Flips a bit of the one place in a file that holds these bytes."""
    content = bytearray(file.read_bytes())
    assert content.count(needle) == 1
    content[content.index(needle)] ^= 1
    file.write_bytes(content)


def codes_of(codec: Codec, group: Group) -> Codes:
    """Memory for the codes of a group."""
    return Codes(codec, {piece: codec.empty(count, n) for piece, (count, n) in enumerate(group.sizes)})
