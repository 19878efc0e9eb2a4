"""``SCARAccelerator``: priority checkpoints for loops that are written with Hugging Face Accelerate.

Nothing here imports Lightning.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import IterableDataset
from typing_extensions import Unpack, override

from lightning_scar.continuation.stale_gradients import reshuffled
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.training_state import TrainingState
from lightning_scar.loops import private
from lightning_scar.loops.continuation import SCARContinuation
from lightning_scar.loops.framework import Framework
from lightning_scar.loops.loop import SCARLoop
from lightning_scar.loops.options import LoopOptions


class SCARAccelerator(SCARLoop):
    """Saves the blocks of an Accelerate loop that moved furthest, often, and resumes from them.

    It saves what the accelerator holds when :meth:`resume` is called: models, optimizers, schedulers, the scaler and
    everything given to ``register_for_checkpointing``. ``accelerator.save_state`` and ``load_state`` work as usual.

    Args:
        accelerator: The accelerator; ``prepare`` may be called later.
        dirpath: The running checkpoint's directory, a path or any fsspec URL.
        continuation: Lets the workers survive the death of others; use :meth:`training_step` then.
        options: Those of :class:`~lightning_scar.loops.loop.SCARLoop`, such as ``every_n_steps=25``.

    Raises:
        ValueError: If a value is out of range, or the accelerator shards the state over its processes (FSDP, DeepSpeed,
            Megatron-LM, tensor parallelism).

    Example::

        >>> import torch
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(cpu=True)
        >>> scar = SCARAccelerator(accelerator, "memory://accelerate-example", every_n_steps=25, fraction=0.125)
        >>> model = torch.nn.Linear(4, 1)
        >>> loader = torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=2)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        >>> with scar:
        ...     _ = scar.resume()
        ...     for batch in scar.batches(loader):
        ...         with accelerator.accumulate(model):
        ...             accelerator.backward(model(batch).square().mean())
        ...             optimizer.step()
        ...             optimizer.zero_grad()
        ...             scar.step()  # saves when due; knows accumulation
        >>> scar.epoch, scar.steps
        (1, 4)

    """

    def __init__(
        self,
        accelerator: Accelerator,
        dirpath: str | os.PathLike[str],
        *,
        continuation: SCARContinuation | None = None,
        **options: Unpack[LoopOptions],
    ) -> None:
        check_accelerator(accelerator)
        super().__init__(dirpath, WithAccelerate(accelerator), continuation=continuation, **options)


class WithAccelerate(Framework):
    """Hugging Face Accelerate, which knows models, optimizers, loaders and accumulation.

    Args:
        accelerator: The accelerator.

    """

    remedy = "call resume() after accelerator.prepare(...)"

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        #: The number of accumulated batches.
        self._accumulated = accelerator.step
        self._muted: list[Any] = []

    @override
    def training_state(self) -> TrainingState:
        return private.training_state(self._accelerator)

    # -- its data ------------------------------------------------------------------------------------------------

    @override
    def torch_loader(self, loader: Any) -> Any:
        return private.torch_loader(loader)

    @override
    def set_epoch(self, loader: Any, epoch: int) -> None:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        else:
            super().set_epoch(loader, epoch)

    @override
    def shuffle_seed(self, loader: Any) -> int | None:
        return private.shuffle_seed(loader)

    @override
    def set_shuffle_seed(self, loader: Any, seed: int) -> None:
        private.set_shuffle_seed(loader, seed)

    @override
    def is_over(self, loader: Any) -> bool:
        # Accelerate fetches a batch ahead, so it knows the last one.
        return bool(getattr(loader, "end_of_dataloader", False))

    @override
    def loader_state(self, loader: Any) -> Any:
        # It keeps the state before the batch that it has fetched ahead.
        return loader.state_dict() if hasattr(private.torch_loader(loader), "state_dict") else None

    @override
    def whole_sampler(self, batch_sampler: Any) -> tuple[Any, Any]:
        return private.whole_sampler(batch_sampler)

    @override
    def batches_per_fetch(self, loader: Any) -> int:
        return private.batches_per_fetch(loader)

    @override
    def batches_ahead(self, loader: Any) -> int:
        return private.batches_per_fetch(loader)

    @override
    def given(self, loader: Any, batch: Any) -> Any:
        return private.to_device_of(loader, batch)

    @override
    def share(self, loader: Any, ranks: Ranks) -> tuple[int, int]:
        # The main process takes what all need, and hands it out.
        return (0, 1) if private.runs_collectives(loader) else super().share(loader, ranks)

    @override
    def record_batch(self) -> None:
        self._accumulated = self._accelerator.step

    @override
    def accumulated(self) -> dict[str, Any]:
        return {"accumulated": self._accumulated}

    @override
    def restore_accumulated(self, position: Mapping[str, Any]) -> None:
        self._accelerator.step = self._accumulated = position["accumulated"]

    # -- a step --------------------------------------------------------------------------------------------------

    @property
    @override
    def synchronizes(self) -> bool:
        return bool(self._accelerator.sync_gradients)

    @property
    @override
    def micro_batches(self) -> int:
        return int(self._accelerator.gradient_accumulation_steps)

    # -- continuation --------------------------------------------------------------------------------------------

    @override
    def check_continuation(self) -> None:
        super().check_continuation()
        if any(map(private.runs_collectives, private.loaders(self._accelerator))):
            raise ValueError(
                "SCARContinuation does not support loaders whose batches the main process dispatches, because workers "
                "could not continue without that process. Pass "
                "dataloader_config=DataLoaderConfiguration(dispatch_batches=False) to the Accelerator."
            )

    @override
    def check_beginning(self) -> None:
        if private.loaders(self._accelerator) or self.training_state().modules:
            raise ValueError(
                "with a SCARContinuation, create SCARAccelerator before accelerator.prepare(...): a replacement must "
                "know its rank before the data are divided"
            )

    @override
    def set_up_joiner(self, slot: int, size: int) -> None:
        private.set_processes(slot, size)

    @override
    def on_join(self) -> None:
        self._muted = private.mute_loaders(self._accelerator)

    @override
    def before_step(self) -> None:
        private.unmute_loaders(self._accelerator, self._muted)
        self._muted = []

    @override
    def regroup(self, rank: int, size: int, local_rank: int) -> None:
        # Unless on CPU, the local rank is the index of this process's device, which must not change.
        is_free = self._accelerator.device.type == "cpu"
        private.set_processes(rank, size, local_rank if is_free else None)

    @override
    @contextmanager
    def counting_all(self, size: int) -> Iterator[None]:
        rank, present = self._accelerator.process_index, self._accelerator.num_processes
        private.set_processes(rank, size)
        try:
            yield
        finally:
            private.set_processes(rank, present)

    @override
    @contextmanager
    def accumulating(self) -> Iterator[None]:
        present = self._accelerator.sync_gradients
        private.set_sync_gradients(self._accelerator, False)
        try:
            yield
        finally:
            private.set_sync_gradients(self._accelerator, present)

    @override
    @contextmanager
    def undivided(self) -> Iterator[None]:
        steps = self._accelerator.gradient_accumulation_steps
        self._accelerator.gradient_accumulation_steps = 1
        try:
            yield
        finally:
            self._accelerator.gradient_accumulation_steps = steps

    @override
    def extra_batches(self, loader: Any, seed: int) -> Iterator[Any] | None:
        if loader is None:
            # Before the first batch, assume the first prepared loader.
            loader = next(iter(private.loaders(self._accelerator)), None)
        batch_size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        if loader is None or batch_size is None or isinstance(loader.dataset, IterableDataset):
            return None
        batches = reshuffled(loader, seed, batch_size)
        return (send_to_device(batch, self._accelerator.device) for batch in batches)


def check_accelerator(accelerator: Accelerator) -> None:
    """Raise an error for an accelerator that shards the state over its processes.

    Args:
        accelerator: The accelerator.

    Raises:
        ValueError: For FSDP, DeepSpeed, Megatron-LM and tensor parallelism.

    """
    if name := private.sharding(accelerator):
        raise ValueError(
            f"SCARAccelerator does not support {name}, which shards the state over the processes. Use plain DDP or a "
            f"single process; with {name}, use accelerator.save_state."
        )
