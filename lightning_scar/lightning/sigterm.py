"""SIGTERM in a process with a Trainer."""

import signal
from types import FrameType

import lightning.pytorch as pl
from typing_extensions import override

from lightning_scar.core.sigterm import DeferredSigterm
from lightning_scar.lightning import private


class TrainerSigterm(DeferredSigterm):
    """Replaces Lightning's own handler, whose collective hangs if ranks were interrupted at different points.

    Args:
        trainer: The trainer to stop.

    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        super().__init__()

    @override
    def _note(self, signum: int, frame: FrameType | None) -> None:
        first = not self.received
        super()._note(signum, frame)
        launcher = self._trainer.strategy.launcher
        if first and launcher is not None:
            launcher.kill(signum)

    @override
    def proceed(self) -> None:
        """End the training loop after this batch.

        With several ranks, only rank 0 ends its loop, and the others follow when they miss it. The other ranks only
        save on the signal, because they may be a step ahead or behind.
        """
        if not self._trainer.is_global_zero:
            self.received = False
            return
        self.restore()
        if self._trainer.world_size == 1 and callable(self._previous):
            self._previous(signal.SIGTERM, None)
        private.mark_sigterm(self._trainer)
