"""How often a live run may be healed, and what is said about it."""

import warnings
from dataclasses import dataclass
from typing import Any

from lightning_scar.core.running_checkpoint import RunningCheckpoint


@dataclass(frozen=True)
class Healer:
    """Restores the blocks of a live run that turned NaN or Inf, as often as it may.

    Attributes:
        heal_non_finite: Whether to look before every save.
        max_heals: How often it may happen in one run.

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
        """Checks the limit."""
        if self.max_heals < 1:
            raise ValueError(
                f"max_heals={self.max_heals} must be at least 1; `heal_non_finite=False` switches healing off"
            )

    def is_due(self, running: RunningCheckpoint) -> bool:
        """Whether to look now, before a save: whenever all ranks are there."""
        return self.heal_non_finite and running.ranks.all_here

    def heal(self, running: RunningCheckpoint, checkpoint: dict[str, Any], step: int, **live_parts: Any) -> bool:
        """Restores what is not finite, in place, and warns of it. With several ranks a collective, at the same step.

        Args:
            running: Where to restore it from.
            checkpoint: As for :meth:`~lightning_scar.core.running_checkpoint.RunningCheckpoint.heal`.
            step: The optimizer step, for people.
            live_parts: As there.

        Returns:
            Whether anything had to be restored, on any rank.

        Raises:
            IncompleteError: If there is no finite version of a block.
            RuntimeError: If it happened more than ``max_heals`` times.

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
