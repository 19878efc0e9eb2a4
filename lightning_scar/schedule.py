"""When a save is due."""

import time
from dataclasses import dataclass, field


def check_intervals(full_every_n_saves: int | None, **either: float | None) -> None:
    """Refuses anything but exactly one positive interval.

    Args:
        full_every_n_saves: May be left out.
        either: The intervals, by the names that the user knows, that in steps first.

    Raises:
        ValueError: Naming the values and what is allowed.

    """
    if sum(value is not None for value in either.values()) != 1:
        given = " and ".join(f"{name}={value}" for name, value in either.items())
        raise ValueError(f"{given}; set exactly one of them, e.g. {next(iter(either))}=25")
    for name, value in {**either, "full_every_n_saves": full_every_n_saves}.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value} must be positive")


@dataclass
class Schedule:
    """Every so many optimizer steps, or every so many seconds.

    Attributes:
        every_n_steps: Optimizer steps between two saves; or
        every_n_seconds: seconds between two saves.
        full_every_n_saves: Every so-manieth is full; ``None`` for none.
        last_full_step: The step of the newest full save, or of the beginning.

    """

    every_n_steps: int | None
    every_n_seconds: float | None
    full_every_n_saves: int | None
    last_full_step: int = field(default=0, init=False)
    _saves: int = field(default=0, init=False)
    _seen_step: int = field(default=0, init=False)
    _last_step: int = field(default=0, init=False)
    _last_time: float = field(default=0.0, init=False)

    def begin(self, step: int) -> None:
        """Counts from here."""
        self._seen_step = self._last_step = self.last_full_step = step
        self._last_time = time.monotonic()

    def is_new(self, step: int) -> bool:
        """Whether a step was not seen before; in the middle of an accumulation it was."""
        seen, self._seen_step = self._seen_step, step
        return step != seen

    def is_due(self, step: int) -> bool:
        """Whether to save now."""
        if self.every_n_steps is not None:
            # Not `%`: with several optimizers a batch may take several steps.
            return step // self.every_n_steps > self._last_step // self.every_n_steps
        assert self.every_n_seconds is not None
        return time.monotonic() - self._last_time >= self.every_n_seconds

    def is_full(self, step: int) -> bool:
        """Whether the save of this step is to be full."""
        if self.full_every_n_saves is None:
            return False
        saves = step // self.every_n_steps if self.every_n_steps is not None else self._saves
        return saves % self.full_every_n_saves == 0

    def note(self, step: int, full: bool) -> None:
        """Takes note of a save."""
        self._saves += 1
        self._last_step, self._last_time = step, time.monotonic()
        if full:
            self.last_full_step = step
