"""Defers SIGTERM to the end of the optimizer step."""

import signal
from types import FrameType


class DeferredSigterm:
    """A handler that only records SIGTERM; the training thread polls it.

    Attributes:
        received: Whether SIGTERM was received.

    """

    def __init__(self) -> None:
        self.received = False
        self._handler = self._note
        self._previous = signal.signal(signal.SIGTERM, self._handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = True

    def restore(self) -> None:
        """Restore the previous handler, unless another one was installed since."""
        if signal.getsignal(signal.SIGTERM) == self._handler:
            signal.signal(signal.SIGTERM, self._previous)

    def proceed(self) -> None:
        """Restore the previous handler, and raise SIGTERM again if it was received."""
        self.restore()
        received, self.received = self.received, False
        if received:
            signal.raise_signal(signal.SIGTERM)
