"""The hooks at which a lazily staged save must end, beside ``SCARCheckpoint`` in a Trainer."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_scar.core.running_checkpoint import RunningCheckpoint


class Fences(Callback):
    """Waits until the current save is copied, before anything changes the state.

    ``SCARCheckpoint`` is the last callback, and saves what the others and the LightningModule have changed. This one is
    the first, so that the save is copied before another callback changes the weights.

    Args:
        running: The running checkpoint.
        pause: Called when something other than a step starts.

    """

    def __init__(self, running: RunningCheckpoint, pause: Callable[[], None]) -> None:
        self._running = running
        self._pause = pause

    @override
    def on_before_optimizer_step(self, *args: Any) -> None:
        """Wait, because the optimizer changes the parameters."""
        self._running.fence()

    @override
    def on_validation_start(self, *args: Any) -> None:
        """Wait, because weight averaging swaps the weights after this hook."""
        self._running.fence()
        self._pause()

    @override
    def on_train_epoch_end(self, *args: Any) -> None:
        """Wait, because callbacks average, prune and swap weights at the end of an epoch."""
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


def before_optimizer_steps(trainer: pl.Trainer, stepped: Callable[[Optimizer], None]) -> RemovableHandle:
    """Register a hook for steps that Lightning's ``on_before_optimizer_step`` does not announce in time.

    That hook runs inside the closure of automatic optimization, after the backward pass. This one runs before the
    closure, so it is for steps without a closure, and for manual optimization, whose closures Lightning may not see.

    Args:
        trainer: The trainer.
        stepped: Called right before such a step.

    Returns:
        A handle to remove the hook.

    """

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The first of the arguments is the optimizer itself.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None or not trainer.lightning_module.automatic_optimization:
            stepped(optimizer)

    return register_optimizer_step_pre_hook(hook)
