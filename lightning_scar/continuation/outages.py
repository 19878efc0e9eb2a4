"""The record of each outage: for users, for programs, for loggers."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, get_args

from lightning_scar.elastic.worker.member import Member

OnFailure = Literal["cover", "shrink", "buffer", "wait"]
FlushMode = Literal["mean", "replay"]

#: What survivors do, for the user.
_HOW = {
    "cover": "go on, and compute the missing batches",
    "shrink": "go on",
    "buffer": "collect stale gradients",
    "wait": "wait",
}


class Finding(IntEnum):
    """Whether survivors can compute missing batches. The smallest finding of all counts."""

    IMPOSSIBLE = 0
    WHOLE = 1
    SLICED = 2


@dataclass(frozen=True)
class OutagePolicy:
    """What survivors do while a worker is missing.

    Args:
        on_failure: ``"cover"``, ``"shrink"``, ``"buffer"`` or ``"wait"``.
        min_world_size: If fewer workers are left, they save and stop.
        max_staleness: The most gradients that a survivor collects beyond that of the interrupted step.
        flush: How collected gradients are applied.

    Raises:
        ValueError: If a value is out of range.

    """

    on_failure: OnFailure = "cover"
    min_world_size: int = 1
    max_staleness: int = 16
    flush: FlushMode = "mean"

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("on_failure", self.on_failure, get_args(OnFailure)),
            ("flush", self.flush, get_args(FlushMode)),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
        if self.min_world_size < 1:
            raise ValueError(f"min_world_size={self.min_world_size} must be at least 1")
        if self.max_staleness < 0:
            raise ValueError(
                f"max_staleness={self.max_staleness} must not be negative; 0 collects nothing beyond a step"
            )


@dataclass
class Outage:
    """One failure, as seen by this worker.

    Attributes:
        step: The number of optimizer steps that were completed.
        reason: Who was lost and how, e.g. ``"rank 2 was killed by SIGKILL"``.
        survivors_seconds: Seconds until this worker had completed the interrupted step.
        seconds: Seconds until the group was complete again; ``None`` before.
        covered_batches: The batches of missing workers that survivors computed.
        stale_gradients: The gradients, beyond that of the interrupted step, that this worker collected and applied.
        steps_lost: Completed steps that had to be repeated.

    """

    step: int
    reason: str = ""
    survivors_seconds: float | None = None
    seconds: float | None = None
    covered_batches: int = 0
    stale_gradients: int = 0
    steps_lost: int = 0
    began: float = field(default_factory=time.monotonic, repr=False)


class Outages:
    """The outages of a training, and the two console lines about each.

    Args:
        log: Receives the metrics of each outage.
        member: This worker; the leader prints the lines.
        policy: What survivors do during an outage.

    """

    def __init__(self, log: Callable[[dict[str, float]], None], member: Member, policy: OutagePolicy) -> None:
        self.list: list[Outage] = []
        self.policy = policy
        #: Whether missing batches can be computed; ``None`` before it is known.
        self.finding: Finding | None = None
        self._log = log
        self._member = member

    @property
    def covers(self) -> bool:
        """Whether survivors compute missing batches, as far as it is known."""
        return self.policy.on_failure == "cover" and self.finding != Finding.IMPOSSIBLE

    @property
    def current(self) -> Outage | None:
        """The outage that is not over, if there is one."""
        return self.list[-1] if self.list and self.list[-1].seconds is None else None

    def record_failure(self, step: int) -> None:
        """Record that the group failed. During an outage, this is part of it."""
        if self.current is None:
            self.list.append(Outage(step))

    def regrouped(self) -> None:
        """Record that the survivors have formed a group."""
        outage, generation = self.current, self._member.generation
        if outage is None or generation is None or (outage.reason and not generation.deaths):
            return
        outage.reason = generation.deaths or "the connection was lost"
        here, all_of_them = len(generation.spawns), self._member.world_size
        how = _HOW["shrink" if self.finding == Finding.IMPOSSIBLE else self.policy.on_failure]
        self._say(f"{outage.reason} in step {outage.step + 1}; {here} of {all_of_them} workers {how}")

    def restarting(self, deaths: str) -> None:
        """Record that all workers will be restarted."""
        if self.current is not None:
            self.current.reason = deaths or self.current.reason or "the connection was lost"

    def stepped(self) -> None:
        """Record that a step is completed."""
        outage = self.current
        if outage is not None and outage.survivors_seconds is None:
            outage.survivors_seconds = time.monotonic() - outage.began

    def rejoined(self, step: int) -> None:
        """Record that the group is complete again."""
        outage = self.current
        if outage is None:
            return
        outage.seconds = time.monotonic() - outage.began
        self._say(
            f"all {self._member.world_size} workers are there again at step {step}: outage {outage.seconds:.1f} s, "
            f"batches covered: {outage.covered_batches}, stale gradients applied: {outage.stale_gradients}, "
            f"steps lost: {outage.steps_lost}"
        )
        metrics = {
            "scar/outages": float(len(self.list)),
            "scar/outage_seconds": outage.seconds,
            "scar/covered_batches": float(outage.covered_batches),
            "scar/stale_gradients": float(outage.stale_gradients),
        }
        self._log(metrics)

    def _say(self, text: str) -> None:
        if self._member.is_leader:
            # On a line of its own, even after a progress bar.
            print(f"\nlightning-scar: {text}", file=sys.stderr, flush=True)
