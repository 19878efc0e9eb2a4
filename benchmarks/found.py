"""What the kills of one method led to."""

from dataclasses import dataclass, field
from typing import Any

from benchmarks.report import median
from benchmarks.step_log import Kill, Recovery


@dataclass
class Found:
    """What the kills of one method led to.

    Attributes:
        recoveries: What followed each kill.
        redone: Steps that were made a second time, for each run.
        hung: Kills after which the survivors did not go on, or not all ranks came together again.
        kills: All of them.
        startups_beside: Seconds that one more worker, of its own, takes to start beside the ranks that train.

    """

    recoveries: list[Recovery] = field(default_factory=list)
    redone: list[int] = field(default_factory=list)
    hung: int = 0
    kills: list[Kill] = field(default_factory=list)
    startups_beside: list[float] = field(default_factory=list)

    def figures(self, name: str) -> dict[str, Any]:
        """Medians, maxima and counts."""
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
        """Those that were measured."""
        return [value for recovery in self.recoveries if (value := getattr(recovery, what)) is not None]
