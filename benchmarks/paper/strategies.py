"""What is compared: how the state is saved, at equal bytes, and how much of it a failure takes."""

from dataclasses import dataclass

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

    """

    fraction: float
    policy: PolicyName = "distance"

    @property
    def name(self) -> str:
        """E.g. ``distance 1/8``."""
        return "full" if self.fraction == 1 else f"{self.policy} 1/{round(1 / self.fraction)}"

    def every(self, largest_block: float) -> int:
        """Iterations from save to save: for all strategies the same bytes in the same time.

        Args:
            largest_block: Its share of the state: no save holds less.

        """
        return max(1, round(PERIOD * max(self.fraction, largest_block)))


FULL = Strategy(1.0)
STRATEGIES = [FULL, *(Strategy(fraction, policy) for fraction in (1 / 2, 1 / 4, 1 / 8) for policy in POLICIES)]
#: The extremes only.
FEW = [FULL, *STRATEGIES[-len(POLICIES) :]]
