"""A training with failures seen from outside: lines that workers log, and how a driver evaluates them.

Every worker process appends ``time step made cpu`` to its own file after each step. The times are from the monotonic
clock, which all processes of a machine share.
"""

import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple


class Line(NamedTuple):
    """A finished step of a worker.

    Attributes:
        made: Whether it updated the parameters; ``False`` if it took another worker's state instead.
        cpu: The processor time that the process has used so far, in seconds.

    """

    time: float
    rank: int
    step: int
    pid: int
    made: bool = True
    cpu: float = 0.0


class StepLog:
    """A worker's log file.

    Args:
        folder: Where it is.
        rank: The worker's rank.

    """

    def __init__(self, folder: Path, rank: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._file = os.open(folder / f"steps-{rank}-{os.getpid()}", flags)

    def add(self, step: int, made: bool = True) -> None:
        """Log a finished step. The line survives the death of this process."""
        os.write(self._file, f"{time.monotonic()} {step} {int(made)} {time.process_time()}\n".encode())


def ranks(folder: Path) -> dict[int, int]:
    """Return the ranks of all processes that have a log, by process id."""
    names = (path.name.split("-") for path in folder.glob("steps-*"))
    return {int(pid): int(rank) for _, rank, pid in names}


def read(folder: Path) -> list[Line]:
    """Return all lines of all workers, ordered by time."""
    lines = []
    for path in folder.glob("steps-*"):
        _, rank, pid = path.name.split("-")
        # The last line may be incomplete.
        for text in path.read_text().splitlines(keepends=True):
            if text.endswith("\n"):
                when, step, made, cpu = text.split()
                lines.append(Line(float(when), int(rank), int(step), int(pid), made == "1", float(cpu)))
    return sorted(lines)


@dataclass(frozen=True)
class Kill:
    """A worker that was killed.

    Args:
        time: The time of the kill.
        rank: Its rank.
        pid: Its process.
        in_collective: Whether it was killed while gradients were being reduced.

    """

    time: float
    rank: int
    pid: int
    in_collective: bool = False


@dataclass(frozen=True)
class Recovery:
    """What followed a kill; ``None`` for what did not happen.

    Attributes:
        survivors_s: Seconds until the slowest of the others had completed its next step. If the kill comes after the
            collective of a step, that step ends normally; so the longer of the two steps after the kill counts.
        rejoined_s: Seconds until all ranks had completed the same step, the first that the replacement took part in.
        pause_s: The longest time between two steps of a survivor from then on and shortly before.

    """

    survivors_s: float | None
    rejoined_s: float | None
    pause_s: float | None


def recovery(lines: Sequence[Line], kill: Kill, ranks: int) -> Recovery:
    """Return what followed a kill.

    Args:
        lines: The lines, at most up to the next kill.
        kill: The kill.
        ranks: The number of ranks.

    """
    after = [line for line in lines if line.time > kill.time and line.pid != kill.pid]
    others = [[line for line in after if line.rank == rank] for rank in range(ranks) if rank != kill.rank]
    new = [line for line in after if line.rank == kill.rank]
    survivors = [_longer_of_two(kill.time, own) for own in others]
    together = [_first_at(own, new[1].step) for own in (*others, new)] if len(new) > 1 else [None]
    rejoined = max((line.time for line in together if line is not None), default=None)
    if rejoined is None or None in together:
        rejoined = None
    return Recovery(
        None if None in survivors else max(value for value in survivors if value is not None),
        None if rejoined is None else rejoined - kill.time,
        None if rejoined is None else max(_pause(own, rejoined) for own in others),
    )


def _longer_of_two(killed: float, own: Sequence[Line]) -> float | None:
    if len(own) < 2:
        return None
    return max(own[0].time - killed, own[1].time - own[0].time)


def _first_at(own: Sequence[Line], step: int) -> Line | None:
    return next((line for line in own if line.step >= step), None)


def _pause(own: Sequence[Line], rejoined: float) -> float:
    times = [line.time for line in own]
    here = sum(when <= rejoined for when in times)
    return max((b - a for a, b in pairwise(times[max(here - 4, 0) : here + 2])), default=0.0)


def redone(lines: Iterable[Line]) -> int:
    """Return the number of repeated steps of the rank that had to repeat most."""
    highest: dict[int, int] = {}
    again: Counter[int] = Counter()
    for line in lines:
        if line.made:
            again[line.rank] += line.step <= highest.get(line.rank, 0)
            highest[line.rank] = max(line.step, highest.get(line.rank, 0))
    return max(again.values(), default=0)


def mistakes(lines: Sequence[Line], steps: int, ranks: int) -> list[str]:
    """Return the mistakes in the step counts of a finished training.

    Args:
        lines: All lines.
        steps: The expected number of steps.
        ranks: The number of ranks.

    Returns:
        A sentence for every mistake.

    """
    found = []
    for pid in sorted({line.pid for line in lines}):
        own = [line for line in lines if line.pid == pid]
        found += [
            f"rank {b.rank} (process {pid}) went from step {a.step} to step {b.step}"
            for a, b in pairwise(own)
            if b.step != a.step + 1
        ]
    missing = sorted(set(range(1, steps + 1)) - {line.step for line in lines if line.made})
    if missing:
        found.append(f"no rank made {len(missing)} of {steps} steps, the first of them {missing[0]}")
    if again := redone(lines):
        found.append(f"{again} steps were made twice by one rank")
    for rank in range(ranks):
        last = max((line.step for line in lines if line.rank == rank), default=0)
        if last != steps:
            found.append(f"the last step of rank {rank} is {last}, and should be {steps}")
    return found
