"""Where a lazily staged save begins and must end: the companion of ``SCARCheckpoint`` in a Trainer."""

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
    """Starts staging at the first hook after a batch, and waits for it before anything changes the state.

    ``SCARCheckpoint`` is the last callback, so that it saves what the others left behind. This one is the first, so
    that a save under way is copied before another callback touches the weights.

    Args:
        running: What is saved to.
        pause: Called when something else than a step begins.

    """

    def __init__(self, running: RunningCheckpoint, pause: Callable[[], None]) -> None:
        self._running = running
        self._pause = pause

    @override
    def on_train_batch_start(self, *args: Any) -> None:
        """The LightningModule's ``on_train_batch_end`` is over: what it changed belongs to the save."""
        self._running.stage()

    @override
    def on_before_optimizer_step(self, *args: Any) -> None:
        """The parameters are about to move."""
        self._running.fence()

    @override
    def on_validation_start(self, *args: Any) -> None:
        """Weight averaging swaps the weights behind this hook."""
        self._running.fence()
        self._pause()

    @override
    def on_train_epoch_end(self, *args: Any) -> None:
        """Callbacks average, prune and swap weights at an epoch's end."""
        self._running.fence()
        self._pause()

    @override
    def on_train_end(self, *args: Any) -> None:
        """As at an epoch's end."""
        self._running.fence()

    @override
    def on_exception(self, *args: Any) -> None:
        """Whoever handles the exception may change the weights."""
        self._running.fence()


def before_optimizer_steps(trainer: pl.Trainer, stepped: Callable[[Optimizer], None]) -> RemovableHandle:
    """Watches steps that Lightning's ``on_before_optimizer_step`` does not announce in time.

    That hook fires inside the closure of automatic optimization, after the backward pass; this one fires before the
    closure, so it is right where there is no closure, and in manual optimization, whose closures Lightning may not see.

    Args:
        trainer: Whose training it is.
        stepped: Called right before such a step.

    Returns:
        Ends the watch with ``remove()``.

    """

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The optimizer itself is the first of the arguments.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None or not trainer.lightning_module.automatic_optimization:
            stepped(optimizer)

    return register_optimizer_step_pre_hook(hook)
