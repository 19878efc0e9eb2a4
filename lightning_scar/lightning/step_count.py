"""The number of optimizer steps of a Trainer, including those that Lightning does not count."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


@dataclass
class StepCount:
    """Counts what Lightning counts, and one step for a batch in which only raw optimizers stepped.

    Attributes:
        outside: The number of steps that Lightning did not count.

    """

    outside: int = 0
    _stepped_outside: bool = field(default=False, init=False, repr=False)
    _seen: int = field(default=0, init=False, repr=False)
    _watch: RemovableHandle | None = field(default=None, init=False, compare=False, repr=False)

    def of(self, trainer: pl.Trainer) -> int:
        """Return the number of steps that a trainer has made."""
        return trainer.global_step + self.outside

    def watch(self, trainer: pl.Trainer, before_outside_step: Callable[[], None]) -> None:
        """Watch for steps that Lightning does not announce, until :meth:`end`.

        Args:
            trainer: The trainer.
            before_outside_step: Called right before each.

        """

        def stepped(optimizer: Optimizer) -> None:
            self._stepped_outside = True
            before_outside_step()

        self._watch = before_optimizer_steps(trainer, stepped)

    def end(self) -> None:
        """Stop watching."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def start_batch(self, trainer: pl.Trainer) -> None:
        """Note where the next batch starts."""
        self._seen = self.of(trainer)

    def count_batch(self, trainer: pl.Trainer) -> None:
        """Count a step of the present batch that Lightning has not counted."""
        if self._stepped_outside and self.of(trainer) == self._seen:
            self.outside += 1
        self._stepped_outside = False


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
