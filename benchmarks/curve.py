"""The loss of one run over wall-clock time, and over steps."""

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """One run.

    Attributes:
        times: The time of each snapshot, in seconds since the first step.
        steps: The number of completed steps at each snapshot.
        losses: The loss on the held-out digits at each snapshot.
        outage: Seconds until all ranks stepped together again; ``None`` without a failure, or if they did not.
        printed: What the supervisor printed about the outage.

    """

    times: list[float]
    steps: list[int]
    losses: list[float]
    outage: float | None
    printed: list[str]

    def at(self, when: float) -> float:
        """Return the loss at a moment, that of the last snapshot."""
        return self.losses[max(bisect_right(self.times, when) - 1, 0)]

    def reaches(self, loss: float) -> float:
        """Return the seconds until the loss is that low; infinite if it never is."""
        return next((when for when, here in zip(self.times, self.losses, strict=True) if here <= loss), float("inf"))

    def by_step(self) -> dict[int, float]:
        """Return the loss after each number of steps, that of the last time where steps were made again."""
        return dict(zip(self.steps, self.losses, strict=True))
