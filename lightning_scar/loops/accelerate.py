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

from lightning_scar.continuation.stale_gradients import shuffled_anew
from lightning_scar.core.training_state import TrainingState
from lightning_scar.loops import private
from lightning_scar.loops.framework import Framework
from lightning_scar.loops.loop import SCARLoop
from lightning_scar.loops.options import Options


class SCARAccelerator(SCARLoop):
    """Saves the blocks of an Accelerate loop that moved furthest, often, and resumes from them.

    Takes models, optimizers, schedulers, the scaler and everything given to ``register_for_checkpointing`` from the
    accelerator: what is there when :meth:`resume` is called. ``accelerator.save_state`` and ``load_state`` work as
    usual.

    Args:
        accelerator: The accelerator; its ``prepare`` may come later.
        dirpath: The running checkpoint's directory, a path or any fsspec URL.
        options: As for :class:`~lightning_scar.loops.loop.SCARLoop`, e.g. ``every_n_steps=25`` and ``fraction=0.125``.

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

    def __init__(self, accelerator: Accelerator, dirpath: str | os.PathLike[str], **options: Unpack[Options]) -> None:
        check_accelerator(accelerator)
        super().__init__(dirpath, WithAccelerate(accelerator), **options)


class WithAccelerate(Framework):
    """Hugging Face Accelerate, which knows models, optimizers, loaders and accumulation.

    Args:
        accelerator: The accelerator.

    """

    remedy = "call resume() behind accelerator.prepare(...)"

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        #: The number of the loader that the loop is over, among the prepared ones.
        self._loader: int | None = None
        #: How many batches have been accumulated.
        self._accumulated = accelerator.step
        self._muted: list[Any] = []

    @override
    def training_state(self) -> TrainingState:
        return private.training_state(self._accelerator)

    # -- its data ------------------------------------------------------------------------------------------------

    @override
    def look_at_batch(self) -> None:
        self._accumulated = self._accelerator.step
        if self._loader is None:
            self._loader = private.active_loader(self._accelerator)

    @override
    def place(self) -> dict[str, Any]:
        loader = self._training_loader()
        return {
            "accumulated": self._accumulated,
            "loader": self._loader,
            "epoch_length": _length(loader),
            "samples": private.total_batch_size(loader),
            "shuffle_seed": None if loader is None else private.shuffle_seed(loader),
        }

    @override
    def take_place(self, batches: int, place: Mapping[str, Any], before: int, now: int) -> int:
        self._accelerator.step = self._accumulated = place["accumulated"]
        self._loader = place["loader"]
        loader = self._training_loader()
        epoch_length: int = _length(loader) or 0
        if loader is None or not place["epoch_length"] or not epoch_length:
            return super().take_place(batches, place, before, now)
        # Ranks share out each epoch by itself, and the last batches of one may be no multiple of theirs.
        epoch, batch = divmod(batches, int(place["epoch_length"]))
        total = private.total_batch_size(loader)
        if total and place["samples"]:
            # The size of a batch may have changed, too.
            before, now = int(place["samples"]), total
        batch = min(super().take_place(batch, place, before, now), epoch_length)
        loader.set_epoch(epoch)
        if place["shuffle_seed"] is not None:
            private.set_shuffle_seed(loader, place["shuffle_seed"])
        if batch and private.shuffles_anew(loader):
            warnings.warn(
                "lightning-scar: this loader cannot shuffle its interrupted epoch in the same order again, so some of "
                "its samples will come twice and others not at all. Give the Accelerator "
                "dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True).",
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
                "SCARContinuation does not support loaders whose batches the main process hands out: nobody could go "
                "on without it. Give the Accelerator dataloader_config=DataLoaderConfiguration(dispatch_batches=False)."
            )

    @override
    def check_beginning(self) -> None:
        if private.loaders(self._accelerator) or self.training_state().modules:
            raise ValueError(
                "with a SCARContinuation, make SCARAccelerator before accelerator.prepare(...): a replacement must "
                "know its place before data are shared out"
            )

    @override
    def set_up_joiner(self, slot: int, size: int) -> None:
        private.set_processes(slot, size)

    @override
    def joins(self) -> None:
        self._muted = private.mute_loaders(self._accelerator)

    @override
    def has_joined(self) -> None:
        private.unmute_loaders(self._accelerator, self._muted)
        self._muted = []

    @override
    def regroup(self, rank: int, size: int, local_rank: int) -> None:
        # Where there are devices, it is the number of this process's own, for barriers among others.
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
            # Before the first batch; the first that was prepared is as good a guess as any.
            loader = next(iter(private.loaders(self._accelerator)), None)
        batch_size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        if loader is None or batch_size is None or isinstance(loader.dataset, IterableDataset):
            return None
        batches = shuffled_anew(loader, seed, batch_size)
        return (send_to_device(batch, self._accelerator.device) for batch in batches)


def _length(loader: Any) -> int | None:
    """Batches of an epoch for each process; ``None`` if that cannot be told."""
    try:
        return len(loader)
    except TypeError:
        return None


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuses accelerators that shard the state over their processes.

    Args:
        accelerator: The accelerator.

    Raises:
        ValueError: For FSDP, DeepSpeed, Megatron-LM and tensor parallelism.

    """
    if name := private.sharding(accelerator):
        raise ValueError(
            f"SCARAccelerator does not support {name}: it shards the state over the processes. Use plain DDP or a "
            "single process; with this one, accelerator.save_state."
        )
