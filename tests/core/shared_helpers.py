"""A small training on several real processes that save to one running checkpoint."""

import copy
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from core_helpers import Training, rows_of, saved_steps
from torch import nn, optim
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_scar.core.ranks import Ranks
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings
from lightning_scar.core.zero import shard_state
from lightning_scar.storage.store import DeltaStore

History = dict[int, dict[str, Any]]


def opened(url: str | Path, **settings: Any) -> RunningCheckpoint:
    options = {"fraction": 0.3, "block_size": 256, "refresh": None, **settings}
    return RunningCheckpoint(url, Settings(**options), ranks=Ranks.of_default_group())


def make_training(width: int = 24) -> Training:
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.LayerNorm(width))]
    model = nn.Sequential(*layers, nn.Linear(width, 3))
    return Training(model, optim.Adam(model.parameters(), lr=0.01))


def copied(training: Training) -> dict[str, Any]:
    return copy.deepcopy(training.checkpoint())


class Run(NamedTuple):
    history: History
    written: int
    read: int = 0
    restored: Any = None


def bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def quietly(running: RunningCheckpoint, **options: Any) -> tuple[dict[str, Any], str]:
    """Restores, and returns what was warned of as well."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        restored = running.restore(**options)
    return restored.checkpoint, "\n".join(str(warning.message) for warning in caught)


def go_on(training: Training, running: RunningCheckpoint, steps: int, full_at: int = 0) -> History:
    history = {}
    for _ in range(steps):
        training.step()
        training.save(running, full=training.steps == full_at)
        history[training.steps] = copied(training)
    return history


def trained(rank: int, url: str, steps: int = 4, width: int = 24, full_at: int = 0, **settings: Any) -> Run:
    training = make_training(width)
    with opened(url, **settings) as running:
        history = go_on(training, running, steps, full_at)
        return Run(history, running.stats.bytes_written)


def resumed(rank: int, url: str, steps: int = 0, width: int = 24, full_at: int = 0, **settings: Any) -> Run:
    training = make_training(width)
    with opened(url, **settings) as running:
        before = bytes_read()
        restored = running.restore()
        read = bytes_read() - before
        found = copy.deepcopy(restored.checkpoint)
        training.load(restored.checkpoint)
        history = go_on(training, running, steps, full_at)
        return Run(history, running.stats.bytes_written, read, found)


def state_bytes(checkpoint: dict[str, Any]) -> int:
    """Parameters and two moments of each."""
    return 3 * sum(tensor.nbytes for tensor in checkpoint["state_dict"].values())


def assert_made_of(found: dict[str, Any], history: History, url: str) -> None:
    """Every block, with its optimizer rows, has the values of the step that its version names."""
    names = list(found["state_dict"])
    for key, step in saved_steps(url).items():
        name = key.removeprefix("state_dict/").rpartition("[")[0]
        then, rows, i = history[step], rows_of(key), names.index(name)
        assert torch.equal(found["state_dict"][name][rows], then["state_dict"][name][rows]), key
        for slot in ("exp_avg", "exp_avg_sq"):
            expected = then["optimizer_states"][0]["state"][i][slot][rows]
            assert torch.equal(found["optimizer_states"][0]["state"][i][slot][rows], expected), (key, slot)
    assert found["global_step"] == max(history)


def refreshed(url: str | Path) -> DeltaStore:
    store = DeltaStore(url)
    store.refresh()
    return store


class Sharded(Training):
    """A training whose optimizer state lies on all ranks in shards."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes = [(24, 20), (20, 9), (9, 30), (30, 2)]
        model = nn.Sequential(*(nn.Linear(a, b) for a, b in sizes))
        super().__init__(model, ZeroRedundancyOptimizer(model.parameters(), optim.Adam, lr=0.01))

    def checkpoint(self) -> dict[str, Any]:
        states = [shard_state(optimizer) for optimizer in self.optimizers]
        return {"state_dict": self.model.state_dict(), "optimizer_states": states, "global_step": self.steps}


def whole_state(training: Training) -> dict[str, Any]:
    """The checkpoint with the states of all shards; a collective."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, copied(training))
    states = {i: values for part in parts for i, values in part["optimizer_states"][0]["state"].items()}
    whole: dict[str, Any] = parts[0]
    whole["optimizer_states"][0]["state"] = dict(sorted(states.items()))
    return whole
