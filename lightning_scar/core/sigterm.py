"""SIGTERM, put off to the next optimizer-step boundary."""

import signal
from types import FrameType


class DeferredSigterm:
    """Notes SIGTERM in its handler and leaves everything else to the training thread, which asks.

    Attributes:
        received: Whether it came.

    """

    def __init__(self) -> None:
        self.received = False
        self._handler = self._note
        self._previous = signal.signal(signal.SIGTERM, self._handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = True

    def restore(self) -> None:
        """Puts the previous handler back, unless someone else has taken over since."""
        if signal.getsignal(signal.SIGTERM) == self._handler:
            signal.signal(signal.SIGTERM, self._previous)

    def proceed(self) -> None:
        """Puts the previous handler back, and lets a signal that came do what it would have done."""
        self.restore()
        received, self.received = self.received, False
        if received:
            signal.raise_signal(signal.SIGTERM)
