"""The private parts of Accelerate that this package leans on.

Each stands behind one function here, and each function has a test that fails loudly when Accelerate changes.
"""

import os
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, SeedableRandomSampler, get_sampler
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.utils.data import RandomSampler

from lightning_scar.core.training_state import TrainingState

#: Of these no process holds the whole state.
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def sharding(accelerator: Accelerator) -> str | None:
    """What shards the state over the processes, by its name; ``None`` if each process holds all of it."""
    if accelerator.distributed_type in _SHARDED:
        return str(accelerator.distributed_type.value)
    # A plugin is of no effect in a single process, but it was asked for.
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true":
            return name
    parallelism = getattr(accelerator, "parallelism_config", None)
    return "tensor parallelism" if parallelism is not None and parallelism.tp_enabled else None


def training_state(accelerator: Accelerator) -> TrainingState:
    """What ``accelerator.save_state`` would save.

    Args:
        accelerator: The accelerator.

    Returns:
        The prepared models under their numbers, and everything else that it knows of.

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
    """The prepared loaders, in order."""
    prepared: list[Any] = accelerator._dataloaders
    return prepared


def active_loader(accelerator: Accelerator) -> int | None:
    """The number of the prepared loader that is being iterated over; ``None`` if it is another one."""
    # One that skips its first batches is not itself prepared, but of the same data.
    data = getattr(accelerator.gradient_state.active_dataloader, "dataset", None)
    return next((i for i, loader in enumerate(loaders(accelerator)) if loader.dataset is data), None)


def total_batch_size(loader: Any) -> int | None:
    """Samples in a batch of all processes together; ``None`` where that cannot be told."""
    try:
        return int(loader.total_batch_size)
    except (AttributeError, TypeError):
        return None


def shuffle_seed(loader: Any) -> int | None:
    """What the order of a loader's epochs is made from, beside their number; ``None`` where it is not made so."""
    sampler = get_sampler(loader)
    return sampler.initial_seed if isinstance(sampler, SeedableRandomSampler) else None


def set_shuffle_seed(loader: Any, seed: int) -> None:
    """Sets :func:`shuffle_seed`."""
    get_sampler(loader).initial_seed = seed


def shuffles_anew(loader: Any) -> bool:
    """Whether an epoch's order cannot be had again."""
    sampler = get_sampler(loader)
    return isinstance(sampler, RandomSampler) and not isinstance(sampler, SeedableRandomSampler)


# -- continuation ------------------------------------------------------------------------------------------------------


def set_processes(rank: int, size: int, local_rank: int | None = None) -> None:
    """Tells Accelerate that the process group is another one, or, with a size of 1, that there is none.

    Args:
        rank: This process's number in it; the first does what only the main process does.
        size: How many processes it has.
        local_rank: Its number among those of its node; the first prints. ``None`` leaves it as it is.

    """
    for state in (PartialState(), AcceleratorState()):
        kind = vars(state).setdefault("_scar_distributed_type", state.distributed_type)
        state.num_processes, state.process_index = size, rank
        state.local_process_index = state.local_process_index if local_rank is None else local_rank
        state.distributed_type = kind if size > 1 else DistributedType.NO


def mute_loaders(accelerator: Accelerator) -> list[Any]:
    """Keeps loaders from synchronising their random generators, which is a collective, when they are begun.

    Returns:
        For :func:`unmute_loaders`.

    """
    kinds = [getattr(loader, "rng_types", None) for loader in loaders(accelerator)]
    for loader in loaders(accelerator):
        loader.rng_types = None
    return kinds


def unmute_loaders(accelerator: Accelerator, kinds: list[Any]) -> None:
    """Undoes :func:`mute_loaders`."""
    for loader, kind in zip(loaders(accelerator), kinds, strict=False):
        loader.rng_types = kind


def runs_collectives(loader: Any) -> bool:
    """Whether each batch of a loader is handed out by the main process."""
    return isinstance(loader, DataLoaderDispatcher)
