"""Heals a live run, up to a limit, and warns about it."""

import warnings
from dataclasses import dataclass
from typing import Any

from lightning_scar.core.running_checkpoint import RunningCheckpoint


@dataclass(frozen=True)
class Healer:
    """Restores the blocks of a live run that turned NaN or Inf, up to a limit.

    Attributes:
        heal_non_finite: Whether to check before every save.
        max_heals: The most heals in one run.

    Raises:
        ValueError: If a value is out of range.

    Example::

        >>> Healer(heal_non_finite=True, max_heals=0)
        Traceback (most recent call last):
        ...
        ValueError: max_heals=0 must be at least 1; `heal_non_finite=False` switches healing off

    """

    heal_non_finite: bool = False
    max_heals: int = 3

    def __post_init__(self) -> None:
        """Check the limit."""
        if self.max_heals < 1:
            raise ValueError(
                f"max_heals={self.max_heals} must be at least 1; `heal_non_finite=False` switches healing off"
            )

    def is_due(self, running: RunningCheckpoint) -> bool:
        """Return whether to check now, before a save: only when no rank is missing."""
        return self.heal_non_finite and running.ranks.all_here

    def heal(self, running: RunningCheckpoint, checkpoint: dict[str, Any], step: int, **live_parts: Any) -> bool:
        """Restore non-finite blocks in place, and warn. With several ranks a collective, at the same step.

        Args:
            running: The running checkpoint to restore from.
            checkpoint: As in :meth:`~lightning_scar.core.running_checkpoint.RunningCheckpoint.heal`.
            step: The optimizer step, for the warning.
            live_parts: The other arguments of that method.

        Returns:
            Whether any rank restored a block.

        Raises:
            IncompleteError: If a block has no finite version.
            RuntimeError: After more than ``max_heals`` heals.

        """
        plan = running.heal(checkpoint, **live_parts)
        if plan is None:
            return False
        running.stats.heals += 1
        if running.stats.heals > self.max_heals:
            raise RuntimeError(
                f"training turned NaN or Inf again after {self.max_heals} heals (max_heals); find the cause first, "
                f"e.g. too high a learning rate. The last good state is in {running.store.directory}."
            )
        if running.ranks.rank == 0:
            warnings.warn(f"lightning-scar: NaN or Inf at step {step}, healed: {plan}", stacklevel=3)
        return True
