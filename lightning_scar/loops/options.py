"""The options of a loop, as the type of its keyword arguments."""

from datetime import timedelta
from typing import Any, Literal, TypedDict

from lightning_scar.core.selection import Policy
from lightning_scar.core.settings import PolicyName


class LoopOptions(TypedDict, total=False):
    """The fields of :class:`~lightning_scar.core.options.Options`, as keyword arguments.

    Args:
        every_n_steps: Save every N optimizer steps. Set at most one of the three intervals.
        train_time_interval: Save when this time has passed, at the next optimizer step.
        max_overhead: Save as often as this share of the training time allows, in (0, 1), and at least every 10 minutes.
            Without any interval it is 0.01.
        fraction: The share of the state's bytes that one save may write, in (0, 1], refresh included.
        refresh: ``"auto"`` spends a part of that on a low-precision copy of all that a save does not write exactly;
            ``None`` is SCAR's own form.
        policy: ``"distance"``, ``"round_robin"``, ``"random"``, or a function from
            :class:`~lightning_scar.core.selection.Candidates` to one priority per block.
        block_size: Bytes of a parameter's rows in a block; ``None`` aims at 4096 blocks of 4 KiB to 4 MiB.
        max_age: Steps after which a block is written, whatever its priority; ``None`` for no limit.
        full_every_n_saves: Make every Nth save full, for ``load(dirpath, consistent=True)``; ``None`` for the first and
            the last only.
        staging: ``"lazy"`` scores and copies during the next forward and backward, ``"eager"`` at once.
        resume: Whether to resume from what ``dirpath`` holds; ``False`` starts again and overwrites it.
        strict: Whether a running checkpoint of another model is an error; ``False`` loads what fits.
        save_on_exception: Whether to save when training ends with an exception or Ctrl-C.
        on_write_error: ``"warn"`` continues the training when a save cannot be written, ``"raise"`` stops it.
        heal_non_finite: Whether to check for NaN and Inf before every save, and to restore the blocks that contain any,
            on all ranks; see :meth:`heal`.
        max_heals: How often that may happen in one run; after that it is an error.
        memory: Whether to save to this host's memory first, which outlives the processes (``/dev/shm``, or what the
            environment variable ``LIGHTNING_SCAR_MEMORY`` names).
        durable_every_n_saves: With ``memory``, every Nth save also goes to ``dirpath``; full ones always do.
        replicas: With ``memory``, the number of other hosts on which each rank keeps a copy, in case its host is lost.
        memory_limit: With ``memory``, the bytes that each rank may use, and each of its copies; ``None`` for all that
            is free.
        storage_options: Arguments of the file system of ``dirpath``.

    """

    every_n_steps: int | None
    train_time_interval: timedelta | None
    max_overhead: float | None
    fraction: float
    refresh: Literal["auto"] | None
    policy: PolicyName | Policy
    block_size: int | None
    max_age: int | None
    full_every_n_saves: int | None
    staging: Literal["lazy", "eager"]
    resume: bool
    strict: bool
    save_on_exception: bool
    on_write_error: Literal["warn", "raise"]
    heal_non_finite: bool
    max_heals: int
    memory: bool
    durable_every_n_saves: int
    replicas: int
    memory_limit: int | None
    storage_options: dict[str, Any] | None
