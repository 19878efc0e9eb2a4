"""Early errors for what ``SCARCheckpoint`` does not support."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

_SHARDED = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


@contextmanager
def as_misconfiguration() -> Iterator[None]:
    """Raise a ``ValueError`` as Lightning's own exception.

    Raises:
        MisconfigurationException: With the message of the error.

    """
    try:
        yield
    except ValueError as error:
        raise MisconfigurationException(f"SCARCheckpoint: {error}") from None


def check_strategy(trainer: pl.Trainer) -> None:
    """Raise an error for strategies in which no process holds the complete state.

    Raises:
        MisconfigurationException: For FSDP, DeepSpeed and model parallelism.

    """
    if isinstance(trainer.strategy, _SHARDED):
        raise MisconfigurationException(
            f"SCARCheckpoint does not support {type(trainer.strategy).__name__}, which shards the state over the "
            "ranks. Use `strategy='ddp'` or a single device, or ModelCheckpoint with this strategy."
        )
