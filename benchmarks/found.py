"""The results of killing workers under one method."""

from dataclasses import dataclass, field
from typing import Any

from benchmarks.report import median
from benchmarks.step_log import Kill, Recovery


@dataclass
class Found:
    """The results of killing workers under one method.

    Attributes:
        recoveries: What followed each kill.
        redone: Repeated steps, for each run.
        hung: Kills after which the survivors did not continue, or not all ranks stepped together again.
        kills: All kills.
        startups_beside: Seconds that a separate worker takes to start while the ranks train.

    """

    recoveries: list[Recovery] = field(default_factory=list)
    redone: list[int] = field(default_factory=list)
    hung: int = 0
    kills: list[Kill] = field(default_factory=list)
    startups_beside: list[float] = field(default_factory=list)

    def figures(self, name: str) -> dict[str, Any]:
        """Return medians, maxima and counts."""
        found: dict[str, Any] = {f"{name}_kills": len(self.kills), f"{name}_hung": self.hung}
        found[f"{name}_kills_in_collective"] = sum(kill.in_collective for kill in self.kills)
        found[f"{name}_redone"] = max(self.redone, default=0)
        found[f"{name}_redone_a_kill"] = sum(self.redone) / max(len(self.kills), 1)
        found[f"{name}_startup_beside_s"] = median(self.startups_beside)
        for what in ("survivors_s", "rejoined_s", "pause_s"):
            samples = self.samples(what)
            found[f"{name}_{what}"] = median(samples)
            found[f"{name}_{what.removesuffix('_s')}_most_s"] = max(samples, default=float("nan"))
        return found

    def samples(self, what: str) -> list[float]:
        """Return the measured samples."""
        return [value for recovery in self.recoveries if (value := getattr(recovery, what)) is not None]
