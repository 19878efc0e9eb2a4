"""What is compared: how the state is saved, at equal bytes, and how much of it a failure takes."""

import math
from dataclasses import dataclass
from typing import Literal

from lightning_scar.core.settings import PolicyName

#: Iterations from one full checkpoint to the next (the paper's C).
PERIOD = 8
#: Shares of the blocks that are lost. With all of them a recovery is a full one, whatever was really lost.
LOST = (0.25, 0.5, 0.75, 1.0)
POLICIES: tuple[PolicyName, ...] = ("distance", "round_robin", "random")


@dataclass(frozen=True)
class Strategy:
    """A way to save.

    Attributes:
        fraction: The share of the state in a save.
        policy: Which blocks these are.
        refresh: Whether a part of a save is a low-precision copy of all other blocks; ``None`` is the paper's form.

    """

    fraction: float
    policy: PolicyName = "distance"
    refresh: Literal["auto"] | None = None

    @property
    def name(self) -> str:
        """E.g. ``distance 1/8``."""
        if self.fraction == 1:
            return "full"
        return f"{'refresh' if self.refresh else self.policy} 1/{round(1 / self.fraction)}"

    def every(self, largest_block: float) -> int:
        """Iterations from save to save: for all strategies the same bytes in the same time.

        Args:
            largest_block: Its share of the state: no save holds less.

        """
        if self.refresh and largest_block > self.fraction:
            # It holds its largest block and, beside that, the refresh of the others.
            return math.ceil(PERIOD * (largest_block + self.fraction))
        return max(1, round(PERIOD * max(self.fraction, largest_block)))


FULL = Strategy(1.0)
#: What the library does by default, after every iteration.
REFRESH = Strategy(1 / 8, refresh="auto")
_OF_PAPER = [Strategy(fraction, policy) for fraction in (1 / 2, 1 / 4, 1 / 8) for policy in POLICIES]
STRATEGIES = [FULL, *_OF_PAPER, REFRESH]
#: The extremes only.
FEW = [FULL, *_OF_PAPER[-len(POLICIES) :], REFRESH]
