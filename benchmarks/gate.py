"""Lets groups of processes take turns, so that neighbouring stretches of steps meet the same machine.

Every group makes a stretch of steps when it is told to, and waits without using the processor while it is not.
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
    """Of so many units in each of five layers."""
    layers = [part for _ in range(LAYERS) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers)


def batches(width: int) -> torch.Tensor:
    """What every step is trained on."""
    return torch.randn(32, width, generator=torch.Generator().manual_seed(0))


class Gate:
    """A worker's side. It opens the first time at the end of the first step.

    Args:
        address: Host and port of the driver's store.
        group: The name of the worker's group.
        rank: The worker's in its group.

    Attributes:
        is_over: Whether there is no further turn.

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
        """Something else that was measured in this step."""
        self._notes.append(value)

    def stepped(self) -> None:
        """A step is done. Returns when the next may begin."""
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
        ranks: How many workers there are in each group.

    """

    def __init__(self, ranks: int) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._ranks = ranks
        self._turns: dict[str, int] = {}
        self.address = f"127.0.0.1:{self._store.port}"

    def is_ready(self, group: str) -> bool:
        """Whether all workers of a group wait for their first turn."""
        return bool(self._store.check([f"ready/{group}/{rank}" for rank in range(self._ranks)]))

    def go(self, group: str, steps: int) -> None:
        """Gives a group its turn; 0 steps end it."""
        turn = self._turns[group] = self._turns.get(group, -1) + 1
        self._store.set(f"go/{group}/{turn}", str(steps))

    def is_done(self, group: str) -> bool:
        """Whether all workers of a group have made their stretch."""
        keys = [f"done/{group}/{self._turns[group]}/{rank}" for rank in range(self._ranks)]
        return bool(self._store.check(keys))

    def measured(self, group: str) -> list[dict[str, list[float]]]:
        """What each worker of the group measured in the last stretch: times of steps, and notes."""
        turn = self._turns[group]
        return [json.loads(self._store.get(f"done/{group}/{turn}/{rank}")) for rank in range(self._ranks)]
