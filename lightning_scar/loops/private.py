"""The private API of Accelerate that this package uses.

Each use is in one function here, and each function has a test that fails when Accelerate changes.
"""

import os
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, SeedableRandomSampler, get_sampler
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.utils.data import RandomSampler

from lightning_scar.core.training_state import TrainingState

#: With these no process holds the complete state.
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def sharding(accelerator: Accelerator) -> str | None:
    """Return the name of what shards the state over the processes; ``None`` if nothing does."""
    if accelerator.distributed_type in _SHARDED:
        return str(accelerator.distributed_type.value)
    # A plugin has no effect in a single process, but it was requested.
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true":
            return name
    parallelism = getattr(accelerator, "parallelism_config", None)
    return "tensor parallelism" if parallelism is not None and parallelism.tp_enabled else None


def training_state(accelerator: Accelerator) -> TrainingState:
    """Return what ``accelerator.save_state`` would save.

    Args:
        accelerator: The accelerator.

    Returns:
        The prepared models by index, and everything else that the accelerator holds.

    """
    scaler = {"scaler": accelerator.scaler} if accelerator.scaler is not None else {}
    custom = {f"custom_{i}": value for i, value in enumerate(accelerator._custom_objects)}
    return TrainingState(
        modules={str(i): model for i, model in enumerate(accelerator._models)},
        optimizers=list(accelerator._optimizers),
        schedulers=list(accelerator._schedulers),
        objects={**scaler, **custom},
    )


def loaders(accelerator: Accelerator) -> list[Any]:
    """Return the prepared loaders, in order."""
    prepared: list[Any] = accelerator._dataloaders
    return prepared


def active_loader(accelerator: Accelerator) -> int | None:
    """Return the index of the prepared loader that is being iterated over; ``None`` if it is another one."""
    # A loader that skips batches is not prepared itself, but has the same dataset.
    data = getattr(accelerator.gradient_state.active_dataloader, "dataset", None)
    return next((i for i, loader in enumerate(loaders(accelerator)) if loader.dataset is data), None)


def total_batch_size(loader: Any) -> int | None:
    """Return the number of samples in a batch over all processes; ``None`` if unknown."""
    try:
        return int(loader.total_batch_size)
    except (AttributeError, TypeError):
        return None


def shuffle_seed(loader: Any) -> int | None:
    """Return the seed of a loader's order, which is combined with the epoch; ``None`` if it has none."""
    sampler = get_sampler(loader)
    return sampler.initial_seed if isinstance(sampler, SeedableRandomSampler) else None


def set_shuffle_seed(loader: Any, seed: int) -> None:
    """Set the seed that :func:`shuffle_seed` returns."""
    get_sampler(loader).initial_seed = seed


def has_lost_order(loader: Any) -> bool:
    """Return whether the order of an epoch cannot be reproduced."""
    sampler = get_sampler(loader)
    return isinstance(sampler, RandomSampler) and not isinstance(sampler, SeedableRandomSampler)


# -- continuation ------------------------------------------------------------------------------------------------------


def set_processes(rank: int, size: int, local_rank: int | None = None) -> None:
    """Tell Accelerate that the process group has changed; with a size of 1, that there is none.

    Args:
        rank: The rank of this process; rank 0 is the main process.
        size: The number of processes.
        local_rank: The rank of this process on its node; ``None`` for no change.

    """
    for state in (PartialState(), AcceleratorState()):
        kind = vars(state).setdefault("_scar_distributed_type", state.distributed_type)
        state.num_processes, state.process_index = size, rank
        state.local_process_index = state.local_process_index if local_rank is None else local_rank
        state.distributed_type = kind if size > 1 else DistributedType.NO


def mute_loaders(accelerator: Accelerator) -> list[Any]:
    """Stop loaders from synchronizing their random generators, a collective, when an iteration starts.

    Returns:
        The argument of :func:`unmute_loaders`.

    """
    kinds = [getattr(loader, "rng_types", None) for loader in loaders(accelerator)]
    for loader in loaders(accelerator):
        loader.rng_types = None
    return kinds


def unmute_loaders(accelerator: Accelerator, kinds: list[Any]) -> None:
    """Undo :func:`mute_loaders`."""
    for loader, kind in zip(loaders(accelerator), kinds, strict=False):
        loader.rng_types = kind


def runs_collectives(loader: Any) -> bool:
    """Return whether the main process dispatches each batch of a loader."""
    return isinstance(loader, DataLoaderDispatcher)
