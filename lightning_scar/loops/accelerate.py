"""``SCARAccelerator``: priority checkpoints for loops that are written with Hugging Face Accelerate.

Nothing here imports Lightning.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import IterableDataset
from typing_extensions import Unpack, override

from lightning_scar.continuation.stale_gradients import reshuffled
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
        ...     for batch in accelerator.skip_first_batches(loader, scar.resume()):
        ...         with accelerator.accumulate(model):
        ...             accelerator.backward(model(batch).square().mean())
        ...             optimizer.step()
        ...             optimizer.zero_grad()
        ...             scar.step()  # saves when due; knows accumulation
        >>> scar.batches, scar.steps
        (4, 4)

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
        #: The index of the loop's loader among the prepared ones.
        self._loader: int | None = None
        #: The number of accumulated batches.
        self._accumulated = accelerator.step
        self._muted: list[Any] = []

    @override
    def training_state(self) -> TrainingState:
        return private.training_state(self._accelerator)

    # -- its data ------------------------------------------------------------------------------------------------

    @override
    def record_batch(self) -> None:
        self._accumulated = self._accelerator.step
        if self._loader is None:
            self._loader = private.active_loader(self._accelerator)

    @override
    def data_position(self) -> dict[str, Any]:
        loader = self._training_loader()
        return {
            "accumulated": self._accumulated,
            "loader": self._loader,
            "epoch_length": _length(loader),
            "samples": private.total_batch_size(loader),
            "shuffle_seed": None if loader is None else private.shuffle_seed(loader),
        }

    @override
    def restore_data_position(self, batches: int, position: Mapping[str, Any], before: int, now: int) -> int:
        self._accelerator.step = self._accumulated = position["accumulated"]
        self._loader = position["loader"]
        loader = self._training_loader()
        epoch_length: int = _length(loader) or 0
        if loader is None or not position["epoch_length"] or not epoch_length:
            return super().restore_data_position(batches, position, before, now)
        # Each epoch is divided among the ranks separately, and its length may not be a multiple of their number.
        epoch, batch = divmod(batches, int(position["epoch_length"]))
        total = private.total_batch_size(loader)
        if total and position["samples"]:
            # The batch size may have changed, too.
            before, now = int(position["samples"]), total
        batch = min(super().restore_data_position(batch, position, before, now), epoch_length)
        loader.set_epoch(epoch)
        if position["shuffle_seed"] is not None:
            private.set_shuffle_seed(loader, position["shuffle_seed"])
        if batch and private.has_lost_order(loader):
            warnings.warn(
                "lightning-scar: this loader cannot reproduce the order of its interrupted epoch, so some samples will "
                "be repeated and others skipped. Pass "
                "dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True) to the Accelerator.",
                stacklevel=4,
            )
        return epoch * epoch_length + batch

    def _training_loader(self) -> Any:
        loaders = private.loaders(self._accelerator)
        return loaders[self._loader] if self._loader is not None and self._loader < len(loaders) else None

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
    def undivided(self) -> Iterator[None]:
        steps = self._accelerator.gradient_accumulation_steps
        self._accelerator.gradient_accumulation_steps = 1
        try:
            yield
        finally:
            self._accelerator.gradient_accumulation_steps = steps

    @override
    def extra_batches(self, seed: int) -> Iterator[Any] | None:
        loader = self._training_loader()
        if loader is None:
            # Before the first batch, assume the first prepared loader.
            loader = next(iter(private.loaders(self._accelerator)), None)
        batch_size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        if loader is None or batch_size is None or isinstance(loader.dataset, IterableDataset):
            return None
        batches = reshuffled(loader, seed, batch_size)
        return (send_to_device(batch, self._accelerator.device) for batch in batches)


def _length(loader: Any) -> int | None:
    """Return the batches of an epoch in each process; ``None`` if unknown."""
    try:
        return len(loader)
    except TypeError:
        return None


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
