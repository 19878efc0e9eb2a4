"""The options of a loop, as the type of its keyword arguments."""

from datetime import timedelta
from typing import Any, Literal, TypedDict

from lightning_scar.core.selection import Policy
from lightning_scar.core.settings import PolicyName


class LoopOptions(TypedDict, total=False):
    """The fields of :class:`~lightning_scar.core.options.Options`, which describes them; a test compares the two."""

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
