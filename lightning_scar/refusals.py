"""What ``SCARCheckpoint`` cannot work with, said at once and with a remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

_SHARDED = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


def check_max_heals(max_heals: int) -> None:
    """Refuses a limit below one.

    Raises:
        MisconfigurationException: Naming the value and what is allowed.

    """
    if max_heals < 1:
        raise MisconfigurationException(
            f"SCARCheckpoint: max_heals={max_heals} must be at least 1; `heal_non_finite=False` switches healing off"
        )


def check_healing(heal_non_finite: bool, every_n_train_steps: int | None, world_size: int) -> None:
    """Refuses healing on several ranks at times of their own: they must heal at the same step.

    Raises:
        MisconfigurationException: With a remedy.

    """
    if heal_non_finite and every_n_train_steps is None and world_size > 1:
        raise MisconfigurationException(
            f"SCARCheckpoint: heal_non_finite=True on {world_size} ranks needs every_n_train_steps in the place of "
            "every_n_seconds: clocks differ, and all ranks must look at the same step"
        )


@contextmanager
def as_misconfiguration() -> Iterator[None]:
    """Makes what is out of range an error of Lightning's.

    Raises:
        MisconfigurationException: Naming the value and what is allowed.

    """
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(f"SCARCheckpoint: {error}") from None


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuses strategies in which no process holds the whole state.

    Raises:
        MisconfigurationException: For FSDP, DeepSpeed and model parallelism.

    """
    if isinstance(trainer.strategy, _SHARDED):
        raise MisconfigurationException(
            f"SCARCheckpoint does not support {type(trainer.strategy).__name__}: it shards the state over the ranks. "
            "Use `strategy='ddp'` or a single device, or ModelCheckpoint with this strategy."
        )
