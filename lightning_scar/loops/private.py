"""The private API of Accelerate that this package uses.

Each use is in one function here, and each function has a test that fails when Accelerate changes.
"""

import os
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, SeedableRandomSampler, get_sampler
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, send_to_device

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


def torch_loader(loader: Any) -> Any:
    """Return the loader of torch inside a prepared loader."""
    return getattr(loader, "base_dataloader", loader)


def whole_sampler(batch_sampler: Any) -> tuple[Any, Any]:
    """Return the batch sampler of the whole dataset inside one process's, and the batch size of one process."""
    if not isinstance(batch_sampler, BatchSamplerShard):
        return batch_sampler, getattr(batch_sampler, "batch_size", None)
    batch_size = batch_sampler.batch_size
    is_divided = batch_sampler.split_batches and batch_size is not None
    return batch_sampler.batch_sampler, batch_size // batch_sampler.num_processes if is_divided else batch_size


def batches_per_fetch(loader: Any) -> int:
    """Return how many batches of its sampler a prepared loader takes for one batch."""
    is_dispatcher = isinstance(loader, DataLoaderDispatcher) and not loader.split_batches
    return int(loader.state.num_processes) if is_dispatcher else 1


def to_device_of(loader: Any, batch: Any) -> Any:
    """Return a batch on the device that a prepared loader moves its own to."""
    device = getattr(loader, "device", None)
    return batch if device is None else send_to_device(batch, device, non_blocking=loader._non_blocking)


def shuffle_seed(loader: Any) -> int | None:
    """Return the seed of a loader's order, which is combined with the epoch; ``None`` if it has none."""
    sampler = get_sampler(loader) if hasattr(loader, "sampler") else None
    return sampler.initial_seed if isinstance(sampler, SeedableRandomSampler) else None


def set_shuffle_seed(loader: Any, seed: int) -> None:
    """Set the seed that :func:`shuffle_seed` returns."""
    get_sampler(loader).initial_seed = seed


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


def set_sync_gradients(accelerator: Accelerator, value: bool) -> None:
    """Set whether a step follows the present batch."""
    accelerator.gradient_state._set_sync_gradients(value)


def runs_collectives(loader: Any) -> bool:
    """Return whether the main process dispatches each batch of a loader."""
    return isinstance(loader, DataLoaderDispatcher)
