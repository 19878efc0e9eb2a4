"""One worker: its process, and what it wrote last to its standard error."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SubprocessContext

_LEASH = Path(__file__).with_name("leash.py")
#: How much of a worker's standard error is kept.
_TAIL_BYTES = 8192
_TAIL_LINES = 30
#: How long what is left of a dead worker's standard error is waited for; somebody else may go on writing to it.
_LAST_WORDS_SECONDS = 5.0


class WorkerProcess:
    """A worker's process, in a session of its own. It dies with this one.

    ``torch.distributed.elastic`` starts it. A ``PContext`` ends all its processes when one fails: so one a worker.

    Args:
        command: The program and its arguments.
        environment: What is added to this process's environment.

    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._errors = _ErrorStream()
        arguments = ("-I", "-S", str(_LEASH), str(os.getpid()), *command)
        self._context = SubprocessContext(
            name="worker",
            entrypoint=sys.executable,
            args={0: arguments},
            envs={0: dict(environment)},
            logs_specs=_StandardError(self._errors.path),
        )
        try:
            # Not start(): that installs signal handlers, which would raise in the midst of the supervisor's work.
            self._context._start()  # type: ignore[no-untyped-call]
        finally:
            self._errors.started()
        handler = self._context.subprocess_handlers[0]
        if handler._stderr is not None:
            handler._stderr.close()  # Only the worker is to hold it: so it ends with the worker.
        self._process = handler.proc
        self._died_at: float | None = None

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; ``None`` while it lives or is heard. What it started ends with it."""
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
        """The last lines of its standard error, once it is over."""
        return self._errors.tail()

    def send(self, number: int) -> None:
        """Sends it a signal. SIGKILL goes to whatever it started, too."""
        if self._process.poll() is not None:
            return  # The next poll() ends what it started.
        if number == signal.SIGKILL:
            self._signal_all(number)
        else:
            self._process.send_signal(number)

    def _signal_all(self, number: int) -> None:
        # Its session's process group has its number.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


class _StandardError(LogsSpecs):
    """Leads standard error to a file and leaves standard output alone."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """As the base class says."""
        return LogsDest(stdouts={0: ""}, stderrs={0: self._path}, error_files={0: ""})

    @property
    def root_log_dir(self) -> str:
        """There is none."""
        return ""


class _ErrorStream:
    """Passes on what comes through a pipe, as it comes, and keeps the end of it."""

    def __init__(self) -> None:
        self._source, self._sink = os.pipe()
        self._kept = b""
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._pass_on, name="worker's standard error", daemon=True)

    @property
    def path(self) -> str:
        """A file name for the end that is written to."""
        return f"/dev/fd/{self._sink}"

    def started(self) -> None:
        """The writer has opened it."""
        os.close(self._sink)
        self._thread.start()

    def finish(self) -> None:
        """The writer is gone: takes what is still in the pipe. Others may hold it open, so its end may never come."""
        self._is_over.set()

    @property
    def is_open(self) -> bool:
        """Whether there may be more in it."""
        return self._thread.is_alive()

    def tail(self) -> str:
        """The last lines of it."""
        lines = self._kept[-_TAIL_BYTES:].decode(errors="replace").split("\n")[-_TAIL_LINES - 1 :]
        # Of a progress bar what was to be seen last.
        return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)

    def _pass_on(self) -> None:
        poll = select.poll()
        poll.register(self._source, select.POLLIN)
        while True:
            if not poll.poll(50):
                if self._is_over.is_set():
                    break
                continue
            chunk = os.read(self._source, 1 << 16)
            if not chunk:
                break
            self._kept = (self._kept + chunk)[-_TAIL_BYTES:]
            _write(chunk)
        os.close(self._source)
        if self._kept and not self._kept.endswith(b"\n"):
            _write(b"\n")  # What follows begins a line of its own.


def _write(chunk: bytes) -> None:
    # Nobody may be reading any more: that is no reason to stop the training.
    with suppress(OSError):
        while chunk:
            chunk = chunk[os.write(sys.stderr.fileno(), chunk) :]
