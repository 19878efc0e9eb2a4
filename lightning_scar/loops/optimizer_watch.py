"""Detects steps of a loop's optimizers, wherever they are called."""

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class OptimizerWatch:
    """Watches every step of every optimizer in this process until :meth:`remove`.

    Args:
        optimizers: The loop's optimizers, whose steps count.
        before_step: Called before a step of any optimizer, which may change tensors that are being copied.

    Attributes:
        has_stepped: Whether one of them has stepped since :meth:`pop`.

    """

    def __init__(self, optimizers: Iterable[Optimizer], before_step: Callable[[], None]) -> None:
        self.has_stepped = False
        self._own = {id(optimizer) for optimizer in optimizers}
        self._hooks = [
            register_optimizer_step_pre_hook(lambda *args: before_step()),
            register_optimizer_step_post_hook(self._stepped),
        ]

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.has_stepped |= id(optimizer) in self._own

    def pop(self) -> bool:
        """Return whether an optimizer has stepped since the last call."""
        has_stepped, self.has_stepped = self.has_stepped, False
        return has_stepped

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
