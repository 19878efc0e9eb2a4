"""Measures what saves cost a training."""

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_scar.core.stats import Stats

#: How many recent steps and saves to measure: enough that a single pause does not move the median.
_STEPS, _SAVES = 32, 9

#: How many saves may follow each other without a quiet step; after that the step time may be out of date.
_STALE = 8


@dataclass
class _UnderWay:
    """Saves that have begun and are not written yet, and the steps made meanwhile."""

    full_saves: int
    saves: int = 1
    steps: int = 0
    seconds: float = 0.0


@dataclass
class Overhead:
    """Compares steps during a save with quiet steps.

    Attributes:
        clock: Returns the time in seconds.

    Example::

        >>> times = iter([0.0, 1.0, 2.0, 3.0, 4.5])
        >>> overhead = Overhead(lambda: next(times))
        >>> for step in (1, 2, 3, 4):
        ...     overhead.stepped(step, is_busy=False, stats=Stats())
        >>> overhead.begins(Stats())
        >>> overhead.stepped(5, is_busy=False, stats=Stats(stall_seconds=0.25))
        >>> overhead.cost(), overhead.step_seconds
        (0.5, 1.0)

    """

    clock: Callable[[], float] = time.monotonic
    _quiet: "deque[float]" = field(default_factory=lambda: deque(maxlen=_STEPS))
    _costs: "dict[bool, deque[float]]" = field(
        default_factory=lambda: {full: deque(maxlen=_SAVES) for full in (False, True)}
    )
    _warm: set[bool] = field(default_factory=set)
    _under_way: _UnderWay | None = None
    _saves_since_quiet: int = 0
    _last: tuple[int, float] | None = None

    def stepped(self, step: int, is_busy: bool, stats: Stats) -> None:
        """Record a completed step.

        Args:
            step: Its number.
            is_busy: Whether a save is under way.
            stats: The stalls of the last saves.

        """
        now, last, save = self.clock(), self._last, self._under_way
        self._last = step, now
        if last is None or step <= last[0]:
            return
        steps, seconds = step - last[0], now - last[1]
        if save is not None:
            save.steps += steps
            save.seconds += seconds
            if not is_busy:
                self._under_way = None
                quiet = self.step_seconds
                longer = save.seconds - save.steps * quiet if quiet is not None else 0.0
                # The running checkpoint may have made the save full by itself.
                full = stats.full_saves > save.full_saves
                stall = stats.full_stall_seconds if full else stats.stall_seconds
                if len(self._costs[full]) == 1 and full not in self._warm:
                    # The first save of a kind allocates its buffers, so it is not typical.
                    self._costs[full].clear()
                    self._warm.add(full)
                self._costs[full].append(max(longer / save.saves, stall))
        elif not is_busy:
            self._quiet.append(seconds / steps)
            self._saves_since_quiet = 0

    def pause(self) -> None:
        """Exclude the time before the next step."""
        self._last = None

    def begins(self, stats: Stats) -> None:
        """Record that a save is about to begin."""
        self._saves_since_quiet += 1
        if self._under_way is None:
            self._under_way = _UnderWay(stats.full_saves)
        else:
            self._under_way.saves += 1

    @property
    def quiet_steps(self) -> int:
        """The number of quiet steps behind :attr:`step_seconds`."""
        return len(self._quiet)

    @property
    def saves(self) -> int:
        """The number of saves behind :meth:`cost`."""
        return len(self._costs[False]) or len(self._costs[True])

    @property
    def is_stale(self) -> bool:
        """Whether the next save should wait for a quiet step, because the last one was many saves ago."""
        return self._saves_since_quiet >= _STALE

    @property
    def step_seconds(self) -> float | None:
        """The seconds of a quiet step; ``None`` before the first one."""
        return _median(self._quiet)

    def cost(self, full_every_n_saves: int | None = None) -> float | None:
        """Return the seconds that a save adds to the training, on average; ``None`` if not known yet.

        Args:
            full_every_n_saves: Every Nth save is full; ``None`` for none.

        """
        partial, full = map(_median, (self._costs[False], self._costs[True]))
        if full_every_n_saves == 1:
            return full
        if partial is None:
            # If several saves were full without being asked for, the next ones will be, too.
            return full if len(self._costs[True]) > 1 else None
        if full is None or full_every_n_saves is None:
            return partial
        return partial + (full - partial) / full_every_n_saves

    def hand_over(self) -> Any:
        """Return what :meth:`take_over` needs in another process."""
        return list(self._quiet), {full: list(costs) for full, costs in self._costs.items()}

    def take_over(self, measured: Any) -> None:
        """Start with the measurements of another process."""
        quiet, costs = measured
        self._quiet.extend(quiet)
        for full, seconds in costs.items():
            self._costs[full].extend(seconds)


def _median(values: "deque[float]") -> float | None:
    return statistics.median(values) if values else None
