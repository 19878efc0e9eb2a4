"""Lets groups of processes take turns, so that neighbouring stretches of steps run under the same conditions.

Every group makes a stretch of steps when it has its turn, and otherwise waits without using the CPU.
"""

import json
import time
from datetime import timedelta

import torch
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

_PATIENCE = timedelta(hours=1)
LAYERS = 5


def perceptron(width: int) -> nn.Module:
    """Return a perceptron with five layers of ``width`` units."""
    layers = [part for _ in range(LAYERS) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers)


def batches(width: int) -> torch.Tensor:
    """Return the batch of every step."""
    return torch.randn(32, width, generator=torch.Generator().manual_seed(0))


class Gate:
    """The worker's side. It opens for the first time at the end of the first step.

    Args:
        address: Host and port of the driver's store.
        group: The name of the worker's group.
        rank: The worker's rank in its group.

    Attributes:
        is_over: Whether there are no more turns.

    """

    def __init__(self, address: str, group: str, rank: int) -> None:
        host, port = address.split(":")
        self._store = TCPStore(host, int(port), is_master=False, timeout=_PATIENCE)
        self._group, self._rank = group, rank
        self._turn = -1
        self._left = 0
        self._times: list[float] = []
        self._notes: list[float] = []
        self.is_over = False

    def note(self, value: float) -> None:
        """Record another measurement of this step."""
        self._notes.append(value)

    def stepped(self) -> None:
        """End a step, and wait until the next may begin."""
        now = time.monotonic()
        if self._turn >= 0:
            self._times.append(now)
            self._left -= 1
        if self._left > 0:
            return
        if self._turn >= 0:
            measured = {"times": self._times, "notes": self._notes}
            self._store.set(f"done/{self._group}/{self._turn}/{self._rank}", json.dumps(measured))
        else:
            self._store.set(f"ready/{self._group}/{self._rank}", "")
        self._turn += 1
        self._left = int(self._store.get(f"go/{self._group}/{self._turn}"))
        self.is_over = self._left == 0
        self._times, self._notes = [time.monotonic()], []


class Keeper:
    """The driver's side.

    Args:
        ranks: The number of workers in each group.

    """

    def __init__(self, ranks: int) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._ranks = ranks
        self._turns: dict[str, int] = {}
        self.address = f"127.0.0.1:{self._store.port}"

    def is_ready(self, group: str) -> bool:
        """Return whether all workers of a group wait for their first turn."""
        return bool(self._store.check([f"ready/{group}/{rank}" for rank in range(self._ranks)]))

    def go(self, group: str, steps: int) -> None:
        """Give a group its turn; 0 steps end the group."""
        turn = self._turns[group] = self._turns.get(group, -1) + 1
        self._store.set(f"go/{group}/{turn}", str(steps))

    def is_done(self, group: str) -> bool:
        """Return whether all workers of a group have finished their stretch."""
        keys = [f"done/{group}/{self._turns[group]}/{rank}" for rank in range(self._ranks)]
        return bool(self._store.check(keys))

    def measured(self, group: str) -> list[dict[str, list[float]]]:
        """Return what each worker of the group measured in the last stretch: times of steps, and notes."""
        turn = self._turns[group]
        return [json.loads(self._store.get(f"done/{group}/{turn}/{rank}")) for rank in range(self._ranks)]
