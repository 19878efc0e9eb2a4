"""What each worker does when: noted by the workers, read by ``benchmarks.outage_picture``."""

import os
import time
from pathlib import Path
from typing import NamedTuple


class Timeline:
    """A worker's notes, which survive its death.

    Args:
        folder: Where its file is.
        rank: The worker's rank.

    """

    def __init__(self, folder: Path, rank: int) -> None:
        import psutil

        self._file = os.open(folder / f"timeline-{rank}-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._write(time.monotonic() - (time.time() - psutil.Process().create_time()), "born")

    def note(self, what: str) -> None:
        """Note what happens now.

        Args:
            what: ``"ready"`` for its first step, or it begins to compute a batch, ``"own"`` or ``"alone"`` (without a
                process group), or is ``"done"`` with that.

        """
        self._write(time.monotonic(), what)

    def _write(self, when: float, what: str) -> None:
        os.write(self._file, f"{when} {what}\n".encode())


class Span(NamedTuple):
    """A stretch of a worker's time.

    Attributes:
        began: In seconds of the monotonic clock.
        ended: The same; infinite if the worker died meanwhile.
        rank: The worker's rank.
        pid: Its process.
        what: ``"own"``, ``"alone"``, or ``"start"``, until it is ready for its first step.

    """

    began: float
    ended: float
    rank: int
    pid: int
    what: str


def read(folder: Path) -> list[Span]:
    """Return all spans of all workers, ordered by time; without processes that never begin to train."""
    spans = []
    for path in folder.glob("timeline-*"):
        _, rank, pid = path.name.split("-")
        if " ready\n" not in path.read_text():
            continue  # The supervisor ran the script, too.
        notes = [text.split() for text in path.read_text().splitlines(keepends=True) if text.endswith("\n")]
        for number, (began, what) in enumerate(notes):
            if what in ("ready", "done"):
                continue
            end = "ready" if what == "born" else "done"
            ended = next((float(when) for when, ending in notes[number + 1 :] if ending == end), float("inf"))
            spans.append(Span(float(began), ended, int(rank), int(pid), "start" if what == "born" else what))
    return sorted(spans)
