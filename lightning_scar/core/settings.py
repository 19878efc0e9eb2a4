"""What a user may set about a running checkpoint, checked as early as possible."""

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
        fraction: The share of the state's bytes that one save may write, in (0, 1]. Never less than one block.
        policy: ``"distance"``, ``"round_robin"``, ``"random"``, or a function from
            :class:`~lightning_scar.core.selection.Candidates` to one priority a block.
        block_size: Bytes of a parameter's rows in a block; ``None`` aims at 4096 blocks of 4 KiB to 4 MiB.
        max_age: Steps after which a block is due whatever its priority; ``None`` for never.
        staging: ``"lazy"`` scores and copies beside the next forward and backward, ``"eager"`` at once.
        on_write_error: ``"warn"`` goes on training, ``"raise"`` stops it.
        memory: Whether saves go to this host's memory first, which outlives the processes.
        durable_every_n_saves: With it, every Nth save goes to storage, too.
        replicas: With it, on how many other hosts each rank keeps a copy.
        memory_limit: Bytes of it that each rank may take, and each of its copies; ``None`` for what there is.
        refresh: ``"auto"`` spends a part of a save on a low-precision copy of all that it does not write exactly;
            ``None`` is the paper's own form.

    Raises:
        ValueError: If a value is out of range; the message names it and what is allowed.

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
        """Checks every value."""
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
            f"memory={self.memory!r} must be True or False; the environment variable {VARIABLE} says which folder",
        )

    @property
    def policy_function(self) -> Policy:
        """The policy as a function."""
        return POLICIES[self.policy] if isinstance(self.policy, str) else self.policy

    def warn_of_block_size(self, notices: Notices, block_size: int, directory: str) -> None:
        """Warns once if a directory was started with another block size.

        Args:
            notices: Warns.
            block_size: That size.
            directory: What it is called.

        """
        if self.block_size not in (None, block_size):
            notices.warn(
                "block_size",
                f"block_size={self.block_size} is left aside: {directory} was started with {block_size}. Begin in a "
                "new directory to change it",
            )

    def warn_of_unused(self, notices: Notices, rank: int) -> None:
        """Warns once, on the first rank, of options of memory where there is none.

        Args:
            notices: Warns.
            rank: This rank.

        """
        names = ("durable_every_n_saves", "replicas", "memory_limit")
        unused = [f"{name}={value!r}" for name in names if (value := getattr(self, name)) != getattr(Settings, name)]
        if unused and not self.memory and rank == 0:
            notices.warn(
                "unused", f"without memory=True nothing comes of {', '.join(unused)}: add it, or leave them out"
            )


_LEAST = {"block_size": 1, "max_age": 0, "durable_every_n_saves": 1, "replicas": 0, "memory_limit": 1}
_MAY_BE_NONE = ("block_size", "max_age", "memory_limit")


def _is_whole_number(value: object) -> bool:
    return isinstance(value, int) and _is_number(value)


def _is_number(value: object) -> bool:
    # To Python a bool is one.
    return isinstance(value, Real) and not isinstance(value, bool)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
