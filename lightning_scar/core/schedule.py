"""Decides when a save is due: every N steps, after some time, or within a share of the training time."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from numbers import Real
from typing import Any, NamedTuple

from lightning_scar.core.agreement import Agreement
from lightning_scar.core.overhead import Overhead
from lightning_scar.core.running_checkpoint import RunningCheckpoint

#: The share of the training time that saves may take by default.
MAX_OVERHEAD = 0.01

#: The longest time between two saves in seconds, whatever they cost.
_LONGEST = 600.0

#: How many quiet steps and saves must be measured; and the longest interval, in steps, until they are.
_QUIET_STEPS, _SURE, _UNSURE_STEPS = 5, 3, 10

#: Rank 0 checks the clock at least this often, in seconds, because steps may become slower.
_LOOK = 10.0

#: The estimate of remaining steps while the step time is unknown.
_FAR = 1 << 20


class Due(NamedTuple):
    """A save that is due.

    Attributes:
        full: Whether to make it full.
        common: Whether all ranks certainly save after this step.

    """

    full: bool
    common: bool = True


def _to_console(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@dataclass
class Schedule:
    """Decides when to save.

    Several ranks all save after the same steps. A number of steps is the same on all of them; a time or a cost is
    converted to steps by rank 0, which tells the others; see :class:`~lightning_scar.core.agreement.Agreement`.

    Attributes:
        every_n_steps: Optimizer steps between two saves.
        train_time_interval: Or the time between two saves.
        max_overhead: Or the share of the training time that saves may take, in (0, 1); 0.01 if none of the three is
            given.
        full_every_n_saves: Every Nth save is full; ``None`` for none.
        steps_name: The user's name for ``every_n_steps``.
        tell: Called with the messages of rank 0.
        last_full_step: The step of the newest full save, or of the start.

    Raises:
        ValueError: If more than one of the three is given, or one is out of range.

    Example::

        >>> Schedule(every_n_steps=25, max_overhead=0.02)
        Traceback (most recent call last):
        ...
        ValueError: every_n_steps=25 and max_overhead=0.02; give one of them, or none for max_overhead=0.01

    """

    every_n_steps: int | None = None
    train_time_interval: timedelta | None = None
    max_overhead: float | None = None
    full_every_n_saves: int | None = None
    steps_name: str = "every_n_steps"
    tell: Callable[[str], None] = field(default=_to_console, compare=False, repr=False)
    last_full_step: int = field(default=0, init=False)
    _running: RunningCheckpoint | None = field(default=None, init=False, repr=False)
    _saves: int = field(default=0, init=False)
    _seen_step: int = field(default=0, init=False)
    _last_step: int = field(default=0, init=False)
    _last_time: float = field(default=0.0, init=False)
    _told: int = field(default=0, init=False)
    _overhead: Overhead = field(default_factory=Overhead, init=False, compare=False, repr=False)
    _agreement: Agreement | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check every value."""
        intervals = {
            self.steps_name: self.every_n_steps,
            "train_time_interval": self.train_time_interval,
            "max_overhead": self.max_overhead,
        }
        given = [f"{name}={value!r}" for name, value in intervals.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}; give one of them, or none for max_overhead={MAX_OVERHEAD}")
        _check_count(self.steps_name, self.every_n_steps)
        _check_count("full_every_n_saves", self.full_every_n_saves)
        _check_time(self.train_time_interval)
        if not given:
            self.max_overhead = MAX_OVERHEAD
        _check_share(self.max_overhead)

    # -- the beginning and the end -------------------------------------------------------------------------------

    def begin(self, step: int, running: RunningCheckpoint, known: Any = None) -> None:
        """Start counting.

        Args:
            step: The step after which training continues.
            running: The running checkpoint to save to.
            known: Another rank's :meth:`hand_over`, in a replacement.

        """
        self._running = running
        self._seen_step = self._last_step = self.last_full_step = step
        self._last_time = time.monotonic()
        self._saves = self._told = 0
        self._overhead = Overhead()
        ticket = running.ticket
        self._agreement = Agreement(f"{ticket.token or running.store.directory}/{ticket.incarnation}", step)
        if known is not None:
            self._saves, self._last_step, elapsed, self._told, measured, agreed = known
            self._last_time -= elapsed
            self._overhead.take_over(measured)
            self._agreement.take_over(agreed)

    def end(self) -> None:
        """Stop: no more saves follow."""
        self._running = self._agreement = None

    def pause(self) -> None:
        """Exclude the time until the next step, because something else follows."""
        self._overhead.pause()

    def hand_over(self) -> Any:
        """Return what a replacement needs to continue."""
        assert self._agreement is not None
        elapsed = time.monotonic() - self._last_time
        known = self._saves, self._last_step, elapsed, self._told
        return *known, self._overhead.hand_over(), self._agreement.hand_over()

    # -- every step ----------------------------------------------------------------------------------------------

    def is_new(self, step: int) -> bool:
        """Return whether a step is new; within a gradient accumulation it is not."""
        seen, self._seen_step = self._seen_step, step
        return step != seen

    def due(self, step: int) -> Due | None:
        """Return the save to begin after a step, ``None`` if none is due. Call this once per step."""
        assert self._running is not None
        assert self._agreement is not None
        if self.every_n_steps is not None:
            # Not `%`: with several optimizers a batch may take several steps.
            number = step // self.every_n_steps
            return Due(self._is_full(number)) if number > self._last_step // self.every_n_steps else None
        busy = self._running.is_busy
        self._overhead.stepped(step, busy, self._running.stats)
        if self._agreement.is_needed:
            plan = self._agreement.due(step, self._propose)
            return Due(plan.save == "full", plan.common) if plan is not None else None
        self._agreement.leave(step)
        return Due(self._is_full(self._saves)) if not busy and self._steps_left(step) <= 0 else None

    def note(self, step: int, full: bool) -> None:
        """Record a save that is about to begin."""
        assert self._running is not None
        self._saves += 1
        self._last_step, self._last_time = step, time.monotonic()
        self._overhead.begins(self._running.stats)
        if full:
            self.last_full_step = step

    def _is_full(self, number: int) -> bool:
        return self.full_every_n_saves is not None and number % self.full_every_n_saves == 0

    # -- what rank 0 decides -------------------------------------------------------------------------------------

    def _propose(self, step: int, horizon: int, saves_now: bool) -> tuple[int, str]:
        """Return when to save next, or when to decide again if that is too far ahead."""
        assert self._running is not None
        seconds = self._overhead.step_seconds
        horizon = min(horizon, max(int(_LOOK / seconds), 1)) if seconds else 1
        left = self._steps_left(step, saves_now)
        if saves_now or self._running.is_busy:
            # Plan no save while one is under way, because its duration is unknown.
            since = 0 if saves_now else step - self._last_step
            return step + max(min(max(left // 2, since // 4), horizon), 1), ""
        if left > horizon:
            return step + horizon, ""
        return step + max(left, 1), "full" if self._is_full(self._saves) else "partial"

    def _steps_left(self, step: int, saves_now: bool = False) -> int:
        """Estimate the steps until a save is due; 0 if it is due now."""
        elapsed = 0.0 if saves_now else time.monotonic() - self._last_time
        if self.train_time_interval is not None:
            return self._in_steps(self.train_time_interval.total_seconds() - elapsed)
        if self._saves == 0 and not saves_now:
            return 0
        every = self._every()
        if every is None or self._overhead.is_stale:
            return max(_QUIET_STEPS - self._overhead.quiet_steps, int(self._overhead.is_stale))
        return min(every - (0 if saves_now else step - self._last_step), self._in_steps(_LONGEST - elapsed))

    def _every(self) -> int | None:
        """Return the interval in steps that keeps saves within ``max_overhead``; ``None`` if not known yet."""
        assert self.max_overhead is not None
        cost, seconds = self._overhead.cost(self.full_every_n_saves), self._overhead.step_seconds
        if cost is None or not seconds or self._overhead.quiet_steps < _QUIET_STEPS:
            return None
        every = max(math.ceil(min(cost / self.max_overhead, _LONGEST) / seconds), 1)
        if self._overhead.saves < _SURE:
            return min(every, _UNSURE_STEPS)
        if not self._told / 2 < every < self._told * 2:
            self._told = every
            share = 100 * cost / (every * seconds + cost)
            self.tell(
                f"lightning-scar: a save costs {cost:.2g} s, a step takes {seconds:.2g} s: saving every "
                f"{f'{every} steps' if every > 1 else 'step'}, for {min(share, 99):.2g} % of the time "
                f"(max_overhead={self.max_overhead:g})"
            )
        return every

    def _in_steps(self, seconds: float) -> int:
        if seconds <= 0:
            return 0
        of_a_step = self._overhead.step_seconds
        return math.ceil(seconds / of_a_step) if of_a_step else _FAR


def _check_count(name: str, count: object) -> None:
    is_whole = isinstance(count, int) and not isinstance(count, bool)
    if count is not None and not (is_whole and count >= 1):  # type: ignore[operator]
        raise ValueError(f"{name}={count!r} must be None or a whole number of at least 1, e.g. 25")


def _check_time(interval: object) -> None:
    if interval is None:
        return
    if not isinstance(interval, timedelta):
        raise ValueError(
            f"train_time_interval={interval!r} must be a datetime.timedelta, e.g. timedelta(minutes=5); from a command "
            "line or YAML '0:05:00'"
        )
    if interval <= timedelta(0):
        raise ValueError(f"train_time_interval={interval!r} must be positive, e.g. timedelta(minutes=5)")


def _check_share(share: object) -> None:
    is_number = isinstance(share, Real) and not isinstance(share, bool)
    if share is not None and not (is_number and 0 < share < 1):  # type: ignore[operator]
        raise ValueError(
            f"max_overhead={share!r} must be in (0, 1): the share of the training time that saves may take, e.g. 0.01"
        )
