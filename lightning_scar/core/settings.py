"""The options of a running checkpoint, checked as early as possible."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from lightning_scar.core.notices import Notices
from lightning_scar.core.selection import POLICIES, Policy
from lightning_scar.storage.host_memory import VARIABLE

PolicyName = Literal["distance", "round_robin", "random"]


@dataclass(frozen=True)
class Settings:
    """How a running checkpoint is saved.

    Attributes:
        fraction: The share of the state's bytes that one save may write, in (0, 1]; at least one block.
        policy: ``"distance"``, ``"round_robin"``, ``"random"``, or a function from
            :class:`~lightning_scar.core.selection.Candidates` to one priority per block.
        block_size: Bytes of a parameter's rows in a block; ``None`` aims at 4096 blocks of 4 KiB to 4 MiB.
        max_age: Steps after which a block is due whatever its priority; ``None`` for never.
        staging: ``"lazy"`` scores and copies during the next forward and backward, ``"eager"`` at once.
        on_write_error: ``"warn"`` continues the training, ``"raise"`` stops it.
        memory: Whether saves go to this host's memory first, which outlives the processes.
        durable_every_n_saves: With ``memory``, every Nth save goes to storage, too.
        replicas: With ``memory``, on how many other hosts each rank keeps a copy.
        memory_limit: Bytes of memory that each rank may take, and each of its copies; ``None`` for all that is free.
        refresh: ``"auto"`` spends a part of each save on a low-precision copy of all blocks that it does not write
            exactly; ``None`` is the paper's original form.

    Raises:
        ValueError: If a value is out of range; the message says what is allowed.

    Example::

        >>> Settings(fraction=0.25).policy_function.__name__
        'distance'

    """

    fraction: float = 0.125
    policy: PolicyName | Policy = "distance"
    block_size: int | None = None
    max_age: int | None = None
    staging: Literal["lazy", "eager"] = "lazy"
    on_write_error: Literal["warn", "raise"] = "warn"
    memory: bool = False
    durable_every_n_saves: int = 8
    replicas: int = 1
    memory_limit: int | None = None
    refresh: Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        """Check every value."""
        _require(
            _is_number(self.fraction) and 0 < self.fraction <= 1,
            f"fraction={self.fraction!r} must be in (0, 1]: the share of the state that one save may write, e.g. 0.125",
        )
        _require(
            self.policy in POLICIES or isinstance(self.policy, Callable),  # type: ignore[arg-type]
            f"policy={self.policy!r} must be one of {', '.join(POLICIES)}, or a function of the candidates",
        )
        _require(self.refresh in ("auto", None), f"refresh={self.refresh!r} must be 'auto' or None")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            may_be_none = name in _MAY_BE_NONE
            _require(
                (may_be_none and value is None) or (_is_whole_number(value) and value >= least),
                f"{name}={value!r} must be {'None or ' if may_be_none else ''}a whole number of at least {least}",
            )
        _require(self.staging in ("lazy", "eager"), f"staging={self.staging!r} must be 'lazy' or 'eager'")
        _require(
            self.on_write_error in ("warn", "raise"),
            f"on_write_error={self.on_write_error!r} must be 'warn' or 'raise'",
        )
        _require(
            isinstance(self.memory, bool),
            f"memory={self.memory!r} must be True or False; the environment variable {VARIABLE} sets the folder",
        )

    @property
    def policy_function(self) -> Policy:
        """The policy as a function."""
        return POLICIES[self.policy] if isinstance(self.policy, str) else self.policy

    def warn_of_block_size(self, notices: Notices, block_size: int, directory: str) -> None:
        """Warn once if a directory was started with another block size.

        Args:
            notices: Warns.
            block_size: The directory's block size.
            directory: Its path.

        """
        if self.block_size not in (None, block_size):
            notices.warn(
                "block_size",
                f"block_size={self.block_size} is ignored: {directory} was started with {block_size}. Use a new "
                "directory to change it",
            )

    def warn_of_unused(self, notices: Notices, rank: int) -> None:
        """Warn once, on rank 0, of options that need ``memory=True``.

        Args:
            notices: Warns.
            rank: This rank.

        """
        names = ("durable_every_n_saves", "replicas", "memory_limit")
        unused = [f"{name}={value!r}" for name in names if (value := getattr(self, name)) != getattr(Settings, name)]
        if unused and not self.memory and rank == 0:
            notices.warn(
                "unused", f"without memory=True, these have no effect: {', '.join(unused)}; add it, or leave them out"
            )


_LEAST = {"block_size": 1, "max_age": 0, "durable_every_n_saves": 1, "replicas": 0, "memory_limit": 1}
_MAY_BE_NONE = ("block_size", "max_age", "memory_limit")


def _is_whole_number(value: object) -> bool:
    return isinstance(value, int) and _is_number(value)


def _is_number(value: object) -> bool:
    # In Python, a bool is a number.
    return isinstance(value, Real) and not isinstance(value, bool)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
