"""The options of the front doors: each with its default and its description, once."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from lightning_scar.core.healer import Healer
from lightning_scar.core.schedule import Schedule
from lightning_scar.core.selection import Policy
from lightning_scar.core.settings import PolicyName, Settings


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user may set in every front door.

    Signatures, docstrings and the table in ``docs/checkpoints.md`` repeat these fields, for editors, LightningCLI and
    readers. A test compares them; ``python tests/test_options.py`` rewrites the docstrings and the table.

    Raises:
        ValueError: If a value is out of range, or there is more than one interval; from the methods.

    """

    every_n_steps: int | None = None
    """Save every N optimizer steps. Set at most one of the three intervals."""

    train_time_interval: timedelta | None = None
    """Save when this time has passed, at the next optimizer step."""

    max_overhead: float | None = None
    """Save as often as this share of the training time allows, in (0, 1), and at least every 10 minutes. Without any
    interval it is 0.01."""

    fraction: float = 0.125
    """The share of the state's bytes that one save may write, in (0, 1], refresh included."""

    refresh: Literal["auto"] | None = "auto"
    """``"auto"`` spends a part of that on a low-precision copy of all that a save does not write exactly; ``None`` is
    SCAR's own form."""

    policy: PolicyName | Policy = "distance"
    """``"distance"``, ``"round_robin"``, ``"random"``, or a function from
    :class:`~lightning_scar.core.selection.Candidates` to one priority per block."""

    block_size: int | None = None
    """Bytes of a parameter's rows in a block; ``None`` aims at 4096 blocks of 4 KiB to 4 MiB."""

    max_age: int | None = None
    """Steps after which a block is written, whatever its priority; ``None`` for no limit."""

    full_every_n_saves: int | None = None
    """Make every Nth save full, for ``load(dirpath, consistent=True)``; ``None`` for the first and the last only."""

    staging: Literal["lazy", "eager"] = "lazy"
    """``"lazy"`` scores and copies during the next forward and backward, ``"eager"`` at once."""

    resume: bool = True
    """Whether to resume from what ``dirpath`` holds; ``False`` starts again and overwrites it."""

    strict: bool = True
    """Whether a running checkpoint of another model is an error; ``False`` loads what fits."""

    save_on_exception: bool = True
    """Whether to save when training ends with an exception or Ctrl-C."""

    on_write_error: Literal["warn", "raise"] = "warn"
    """``"warn"`` continues the training when a save cannot be written, ``"raise"`` stops it."""

    heal_non_finite: bool = False
    """Whether to check for NaN and Inf before every save, and to restore the blocks that contain any, on all ranks; see
    :meth:`heal`."""

    max_heals: int = 3
    """How often that may happen in one run; after that it is an error."""

    memory: bool = False
    """Whether to save to this host's memory first, which outlives the processes (``/dev/shm``, or what the environment
    variable ``LIGHTNING_SCAR_MEMORY`` names)."""

    durable_every_n_saves: int = 8
    """With ``memory``, every Nth save also goes to ``dirpath``; full ones always do."""

    replicas: int = 1
    """With ``memory``, the number of other hosts on which each rank keeps a copy, in case its host is lost."""

    memory_limit: int | None = None
    """With ``memory``, the bytes that each rank may use, and each of its copies; ``None`` for all that is free."""

    storage_options: dict[str, Any] | None = None
    """Arguments of the file system of ``dirpath``."""

    def settings(self) -> Settings:
        """Return the settings of the running checkpoint."""
        return Settings(
            fraction=self.fraction,
            policy=self.policy,
            block_size=self.block_size,
            max_age=self.max_age,
            staging=self.staging,
            on_write_error=self.on_write_error,
            memory=self.memory,
            durable_every_n_saves=self.durable_every_n_saves,
            replicas=self.replicas,
            memory_limit=self.memory_limit,
            refresh=self.refresh,
        )

    def schedule(self, steps_name: str = "every_n_steps", tell: Callable[[str], None] | None = None) -> Schedule:
        """Return the schedule of saves.

        Args:
            steps_name: The name of ``every_n_steps`` in the front door, for errors.
            tell: Receives messages; by default they are printed.

        """
        intervals = self.every_n_steps, self.train_time_interval, self.max_overhead
        schedule = Schedule(*intervals, self.full_every_n_saves, steps_name=steps_name)
        if tell is not None:
            schedule.tell = tell
        return schedule

    def healer(self) -> Healer:
        """Return what restores non-finite blocks."""
        return Healer(self.heal_non_finite, self.max_heals)
