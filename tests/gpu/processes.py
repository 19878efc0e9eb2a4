"""Processes of parts: each ends with all that it has started, when it is done, out of time, or not wanted any more."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from lightning_scar.elastic.prepared.starter import dying_with_this_process


class Processes:
    """Those that run."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._is_over = False

    def run(
        self, command: Sequence[str], cwd: Path, environment: Mapping[str, str], out: Path, errors: Path, limit: float
    ) -> int | None:
        """Run a program to its end; return its exit code, ``None`` if it was out of time."""
        with out.open("wb") as stdout, errors.open("wb") as stderr, self._lock:
            if self._is_over:
                return None
            # With files in the place of pipes, nobody who is left can keep this one waiting.
            process = subprocess.Popen(
                dying_with_this_process(command) if sys.platform == "linux" else command,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            self._running.add(process)
        deadline = time.monotonic() + limit
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        code = process.poll()
        with self._lock:
            self._running.discard(process)
            _end(process)
        return code

    def end_all(self) -> None:
        """End those that run, and start no more."""
        with self._lock:
            self._is_over = True
            for process in self._running:
                _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process with its descendants: a supervisor's workers are in sessions of their own."""
    if process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(process.pid)
            for each in [*first.children(recursive=True), first]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
