"""The options of a loop, for whoever passes them on."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, TypedDict

from torch import Tensor

from lightning_scar.core.selection import Candidates
from lightning_scar.core.settings import PolicyName
from lightning_scar.loops.continuation import SCARContinuation


class Options(TypedDict, total=False):
    """As :class:`~lightning_scar.loops.loop.SCARLoop` describes them."""

    every_n_steps: int | None
    train_time_interval: timedelta | None
    max_overhead: float | None
    fraction: float
    refresh: Literal["auto"] | None
    policy: PolicyName | Callable[[Candidates], Tensor]
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
    continuation: SCARContinuation | None
