"""What ``SCARCheckpoint`` cannot work with, said at once and with a remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

_SHARDED = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


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
