"""What saves cost a training, measured."""

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning_scar.core.stats import Stats

#: So many recent steps and saves tell what one takes: enough for a median that a pause does not move.
_STEPS, _SAVES = 32, 9

#: So many saves in a row may do without a step beside which none is under way, or nobody knows what such a step takes.
_STALE = 8


@dataclass
class _UnderWay:
    """Saves that began and are not written yet, and the steps meanwhile."""

    full_saves: int
    saves: int = 1
    steps: int = 0
    seconds: float = 0.0


@dataclass
class Overhead:
    """Compares the steps beside which a save is under way with the quiet ones.

    Attributes:
        clock: Tells the time in seconds.

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
        """A step is done.

        Args:
            step: Its number.
            is_busy: Whether a save is under way.
            stats: For how long the training thread stood still for the last saves.

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
                # The running checkpoint itself may have made a full one of it.
                full = stats.full_saves > save.full_saves
                stall = stats.full_stall_seconds if full else stats.stall_seconds
                if len(self._costs[full]) == 1 and full not in self._warm:
                    # The first save of a kind makes its buffers, and tells little of those to come.
                    self._costs[full].clear()
                    self._warm.add(full)
                self._costs[full].append(max(longer / save.saves, stall))
        elif not is_busy:
            self._quiet.append(seconds / steps)
            self._saves_since_quiet = 0

    def pause(self) -> None:
        """What comes before the next step is no part of it."""
        self._last = None

    def begins(self, stats: Stats) -> None:
        """A save is about to begin."""
        self._saves_since_quiet += 1
        if self._under_way is None:
            self._under_way = _UnderWay(stats.full_saves)
        else:
            self._under_way.saves += 1

    @property
    def quiet_steps(self) -> int:
        """How many quiet steps :attr:`step_seconds` is told from."""
        return len(self._quiet)

    @property
    def saves(self) -> int:
        """How many saves :meth:`cost` is told from."""
        return len(self._costs[False]) or len(self._costs[True])

    @property
    def is_stale(self) -> bool:
        """Whether the next save should wait for a quiet step: the last one is many saves ago."""
        return self._saves_since_quiet >= _STALE

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a quiet step; ``None`` before there was one."""
        return _median(self._quiet)

    def cost(self, full_every_n_saves: int | None = None) -> float | None:
        """Seconds by which a save makes training longer, on average; ``None`` before that is known.

        Args:
            full_every_n_saves: Every Nth save is a full one; ``None`` for none.

        """
        partial, full = map(_median, (self._costs[False], self._costs[True]))
        if full_every_n_saves == 1:
            return full
        if partial is None:
            # After several that were full although nobody asked for it, the next ones will be, too.
            return full if len(self._costs[True]) > 1 else None
        if full is None or full_every_n_saves is None:
            return partial
        return partial + (full - partial) / full_every_n_saves

    def hand_over(self) -> Any:
        """For :meth:`take_over` in another process."""
        return list(self._quiet), {full: list(costs) for full, costs in self._costs.items()}

    def take_over(self, measured: Any) -> None:
        """Begins with what another process has measured."""
        quiet, costs = measured
        self._quiet.extend(quiet)
        for full, seconds in costs.items():
            self._costs[full].extend(seconds)


def _median(values: "deque[float]") -> float | None:
    return statistics.median(values) if values else None
