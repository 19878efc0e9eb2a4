"""SIGTERM to a process in which a Trainer trains."""

import signal
from types import FrameType

import lightning.pytorch as pl
from typing_extensions import override

from lightning_scar.core.sigterm import DeferredSigterm
from lightning_scar.lightning import private


class TrainerSigterm(DeferredSigterm):
    """Lightning's own handler runs a collective, in which ranks that were interrupted at different places hang.

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
        private.mark_sigterm(self._trainer)
