"""One worker: its process, and the end of its standard error."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO

from lightning_scar.elastic.prepared.starter import Process

#: How much of a worker's standard error is kept.
_TAIL_BYTES = 8192
_TAIL_LINES = 30
#: How long to wait for the rest of a dead worker's standard error: another process may hold it open and write to it.
_LAST_WORDS_SECONDS = 5.0
#: How long to wait for it at once.
_END_SECONDS = 0.05


class WorkerProcess:
    """A worker's process, in a session of its own.

    Args:
        start: Starts it with a standard error.

    """

    def __init__(self, start: Callable[[int], Process]) -> None:
        source, errors = os.pipe()
        try:
            self._process = start(errors)
        except BaseException:
            os.close(source)
            raise
        finally:
            os.close(errors)
        self._errors = _ErrorStream(os.fdopen(source, "rb", buffering=0))
        self._died_at: float | None = None

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; ``None`` while the worker lives or its last words arrive.

        When the worker is dead all that it started is killed.
        """
        if self._died_at is None:
            if self._process.poll() is None:
                return None
            self._died_at = time.monotonic()
            self._signal_all(signal.SIGKILL)
            self._errors.finish()
        if self._errors.is_open and time.monotonic() - self._died_at < _LAST_WORDS_SECONDS:
            return None
        return self._process.returncode

    def tail(self) -> str:
        """Return the last lines of the standard error of a dead worker."""
        return self._errors.tail()

    def send(self, number: int) -> None:
        """Send a signal. SIGKILL also goes to all that the worker started."""
        if self._process.poll() is not None:
            return  # The next poll() ends what it started.
        if number == signal.SIGKILL:
            self._signal_all(number)
        else:
            self._process.send_signal(number)

    def _signal_all(self, number: int) -> None:
        # The process group of its session has its number.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


class _ErrorStream:
    """Copies a pipe to this process's standard error, and keeps the end of it.

    Args:
        source: The end of the pipe to read from.

    """

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._kept = b""
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._copy, name="worker's standard error", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Stop when the pipe is empty. Its end may never come: other processes may hold it open."""
        self._is_over.set()
        # Most often it ends with the process.
        self._thread.join(_END_SECONDS)

    @property
    def is_open(self) -> bool:
        """Whether more may come."""
        return self._thread.is_alive()

    def tail(self) -> str:
        """Return the last lines."""
        lines = self._kept[-_TAIL_BYTES:].decode(errors="replace").split("\n")[-_TAIL_LINES - 1 :]
        # Of a progress bar only its last state was visible.
        return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)

    def _copy(self) -> None:
        poll = select.poll()
        poll.register(self._source, select.POLLIN)
        with self._source:
            while True:
                if not poll.poll(50):
                    if self._is_over.is_set():
                        break
                    continue
                chunk = os.read(self._source.fileno(), 1 << 16)
                if not chunk:
                    break
                self._kept = (self._kept + chunk)[-_TAIL_BYTES:]
                _write(chunk)
        if self._kept and not self._kept.endswith(b"\n"):
            _write(b"\n")  # What follows begins on a line of its own.


def _write(chunk: bytes) -> None:
    # If nobody reads any more, the training still goes on.
    with suppress(OSError):
        while chunk:
            chunk = chunk[os.write(sys.stderr.fileno(), chunk) :]
