"""The hooks at which a lazily staged save must end, beside ``SCARCheckpoint`` in a Trainer."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.lightning.moment import Beginnings


class Fences(Beginnings):
    """Waits until the current save is copied, before anything changes the state.

    ``SCARCheckpoint`` is the last callback, and saves what the others and the LightningModule have changed. This one is
    the first, so that the save is copied before another callback changes the weights.

    Args:
        running: The running checkpoint.
        pause: Called when something other than a step starts.

    """

    def __init__(self, running: RunningCheckpoint, pause: Callable[[], None]) -> None:
        super().__init__()
        self._running = running
        self._pause = pause

    def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
        """Let a copy be a callback that does nothing."""
        return Callback, ()

    @override
    def on_before_optimizer_step(self, *args: Any) -> None:
        """Wait, because the optimizer changes the parameters."""
        self._running.fence()

    @override
    def on_validation_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Wait, because weight averaging swaps the weights after this hook."""
        super().on_validation_start(trainer)
        self._running.fence()
        self._pause()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Wait, because callbacks average, prune and swap weights at the end of an epoch."""
        super().on_train_epoch_end(trainer)
        self._running.fence()
        self._pause()

    @override
    def on_train_end(self, *args: Any) -> None:
        """Wait, as at the end of an epoch."""
        self._running.fence()

    @override
    def on_exception(self, *args: Any) -> None:
        """Wait, because a handler of the exception may change the weights."""
        self._running.fence()
