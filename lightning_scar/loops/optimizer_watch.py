"""Sees the optimizers of a loop step, whoever calls them."""

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class OptimizerWatch:
    """Watches every step of every optimizer in this process until :meth:`end`.

    Args:
        optimizers: Those whose steps count.
        before_step: Called before any optimizer steps: it may be about to change what is being copied.

    Attributes:
        has_stepped: Whether one of them has stepped since :meth:`take`.

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

    def take(self) -> bool:
        """Whether one has stepped since the last call."""
        has_stepped, self.has_stepped = self.has_stepped, False
        return has_stepped

    def end(self) -> None:
        """Looks away."""
        for hook in self._hooks:
            hook.remove()
