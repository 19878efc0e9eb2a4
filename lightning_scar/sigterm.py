"""SIGTERM, put off to the next optimizer-step boundary."""

import signal
from types import FrameType

import lightning.pytorch as pl

from lightning_scar import _lightning


class DeferredSigterm:
    """Notes SIGTERM in its handler and leaves everything else to the training thread.

    Lightning's own handler runs a collective, in which ranks that were interrupted at different places hang.

    Args:
        trainer: The trainer to stop.

    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._previous = signal.getsignal(signal.SIGTERM)
        self._handler = self._note
        self.received = False
        signal.signal(signal.SIGTERM, self._handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        first, self.received = not self.received, True
        launcher = self._trainer.strategy.launcher
        if first and launcher is not None:
            launcher.kill(signum)

    def proceed(self) -> None:
        """Does what was put off: the training loop ends after this batch.

        Of several ranks the first ends its loop, and the others theirs when they miss it: whoever else was signalled
        only saves, for it may be a step ahead or behind.
        """
        if not self._trainer.is_global_zero:
            self.received = False
            return
        self.restore()
        if self._trainer.world_size == 1 and callable(self._previous):
            self._previous(signal.SIGTERM, None)
        _lightning.mark_sigterm(self._trainer)

    def restore(self) -> None:
        """Puts the previous handler back, unless someone else has taken over since."""
        if signal.getsignal(signal.SIGTERM) == self._handler:
            signal.signal(signal.SIGTERM, self._previous)
