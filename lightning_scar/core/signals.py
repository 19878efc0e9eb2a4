"""Signals that ask for the end of a program, deferred to the end of the optimizer step."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from typing_extensions import override

#: A second Ctrl-C within this time is the same request: a scheduler may signal a process in two ways.
_ONE_REQUEST_SECONDS = 1.0


def stop_signals() -> list[int]:
    """Return the signals that ask this process for its end: SIGTERM, Ctrl-C, and SLURM's SIGUSR1.

    Ctrl-C and SIGUSR1 only if they do what they do by default: a program that handles them means something else. None
    outside of the main thread, which may not handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    # Elsewhere a debugger may use it, e.g. `faulthandler`, whose handlers Python does not see.
    if "SLURM_JOB_ID" in os.environ and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        numbers.append(signal.SIGUSR1)
    return [int(number) for number in numbers]


class DeferredSignals:
    """Handlers that only record a signal; the training thread polls them.

    A forked child, such as one of a ``multiprocessing.Pool``, inherits them. It is not the program: it dies of what
    ends it, and leaves Ctrl-C to the program.

    Args:
        numbers: The signals.

    Attributes:
        received: The signal that was received; ``None`` if there was none.

    Example::

        >>> import signal
        >>> signals = DeferredSignals([signal.SIGTERM])
        >>> signal.raise_signal(signal.SIGTERM)
        >>> signals.received == signal.SIGTERM
        True
        >>> signals.restore()

    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._process = os.getpid()
        self._handler = self._handle
        self._numbers = list(numbers)
        self.previous: dict[int, Any] = {}
        self.install()

    def install(self) -> None:
        """Install the handlers, and remember those before."""
        for number in self._numbers:
            before = signal.signal(number, self._handler)
            if before != self._handler:
                self.previous[number] = before

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:
            self._note(signum, frame)
        elif signum != signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signum, now
        elif signum == signal.SIGINT and now - self._received_at > _ONE_REQUEST_SECONDS:
            self._insist()

    def _insist(self) -> None:
        """Interrupt the program at once: the user has pressed Ctrl-C again."""
        raise KeyboardInterrupt

    def restore(self) -> None:
        """Restore the previous handlers, unless others were installed since."""
        for number, before in self.previous.items():
            if signal.getsignal(number) == self._handler:
                signal.signal(number, before)

    def proceed(self) -> None:
        """Restore the previous handlers, and raise the signal again that was received."""
        self.restore()
        received, self.received = self.received, None
        if received is not None:
            signal.raise_signal(received)


class PassedOnSignals(DeferredSignals):
    """Handlers that only tell somebody of a signal, who decides for all processes of a job.

    Args:
        numbers: The signals.
        tell: Called with each signal.

    """

    def __init__(self, numbers: Iterable[int], tell: Callable[[int], None]) -> None:
        self._tell = tell
        super().__init__(numbers)

    @override
    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._tell(signum)
