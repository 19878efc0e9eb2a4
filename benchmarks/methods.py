"""The ways to save that are compared, each with the same interface."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning.pytorch as pl
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save
from typing_extensions import override

from lightning_scar import SCARCheckpoint
from lightning_scar.lightning.private import dump_checkpoint

#: No pinned or shared memory on a CPU; what remains is that the stager keeps its copy from save to save.
_CACHED = StagingOptions(
    use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
)


#: The same on an accelerator: the copies are pinned, and queued without waiting.
_PINNED = replace(_CACHED, use_pinned_memory=True, use_non_blocking_copy=True)


class Method(Protocol):
    """One way to save.

    Attributes:
        name: Its name.
        warm_ups: The number of saves that do not count, in which it allocates its buffers.
        is_slow: Whether a save takes seconds, so that a stretch may be short.

    """

    name: str
    warm_ups: int
    is_slow: bool

    def save(self, trainer: pl.Trainer) -> None:
        """Save; called after an optimizer step, as a callback would."""

    def fence(self) -> None:
        """Wait for what must be done before the next optimizer step."""

    def wait(self) -> None:
        """Wait until everything is written."""

    def discard(self, counts: bool) -> None:
        """Remove what was written; ``counts`` says whether the measurement counts."""

    def close(self) -> None:
        """Release all resources."""


class ToOnePath:
    """A method that writes every save to the same path.

    Args:
        name: Its name.
        path: The path.

    """

    warm_ups = 1
    is_slow = False

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path

    def fence(self) -> None:
        """Wait for nothing."""

    def wait(self) -> None:
        """Wait for nothing."""

    def discard(self, counts: bool) -> None:
        """Remove the path."""
        if self.path.is_dir():
            shutil.rmtree(self.path)
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Wait."""
        self.wait()


class Torch(ToOnePath):
    """Lightning's default: ``torch.save`` in the training thread, no fsync."""

    is_slow = True

    def __init__(self, folder: Path) -> None:
        super().__init__("torch", folder / "torch.ckpt")
        self._io = TorchCheckpointIO()

    def save(self, trainer: pl.Trainer) -> None:
        self._io.save_checkpoint(dump_checkpoint(trainer), self.path)


class Async(ToOnePath):
    """Lightning's ``AsyncCheckpointIO``: a clone of everything, then ``torch.save`` in a thread, no fsync."""

    is_slow = True

    def __init__(self, folder: Path) -> None:
        super().__init__("async", folder / "async.ckpt")
        self._io = AsyncCheckpointIO(TorchCheckpointIO())

    def save(self, trainer: pl.Trainer) -> None:
        self._io.save_checkpoint(dump_checkpoint(trainer), self.path)

    @override
    def wait(self) -> None:
        # Ends its thread; the next save starts another, as in every fit.
        self._io.teardown()


class DCP(ToOnePath):
    """``torch.distributed.checkpoint.async_save`` in a thread, with fsync, at its strongest.

    The stager is kept, so it copies into existing memory, on all cores; the planner keeps its plan. Two writer threads,
    shared memory and safetensors were slower; writing without fsync was not faster.
    ``BlockingAsyncStager(cache_staged_state_dict=True)`` pins memory and so needs a GPU.

    Args:
        folder: Where to write.
        overlapped: Whether the stager copies in its own thread, which is awaited before the next optimizer step. Torch
            documents this option for CUDA; on a CPU users have to build the fence.
        pinned: Whether what is saved is on an accelerator.

    """

    def __init__(self, folder: Path, overlapped: bool = False, pinned: bool = False) -> None:
        name = "dcp_overlapped" if overlapped else "dcp"
        super().__init__(name, folder / name)
        self._stager = DefaultStager(replace(_PINNED if pinned else _CACHED, use_async_staging=overlapped))
        self._planner = DefaultSavePlanner(enable_plan_caching=True)
        self._staged: Future[None] | None = None
        self._written: Future[Any] | None = None

    def save(self, trainer: pl.Trainer) -> None:
        response = async_save(
            dump_checkpoint(trainer),
            storage_writer=FileSystemWriter(self.path),
            planner=self._planner,
            async_stager=self._stager,
            no_dist=True,
        )
        if isinstance(response, Future):
            self._written = response
        else:
            self._staged, self._written = response.staging_completion, response.upload_completion

    @override
    def fence(self) -> None:
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    @override
    def wait(self) -> None:
        self.fence()
        if self._written is not None:
            self._written.result()
            self._written = None

    @override
    def close(self) -> None:
        self.wait()
        self._stager.close()


class GatedSCARCheckpoint(SCARCheckpoint):
    """Saves after the batches for which its gate was opened, through its own hooks only.

    Attributes:
        is_open: Whether to save after the current batch.
        was_eager: Whether the last partial save was copied before the next batch began.

    """

    def __init__(self, dirpath: Path, fraction: float) -> None:
        super().__init__(dirpath, every_n_train_steps=1, fraction=fraction)
        self.is_open = False
        self.was_eager = False
        self._before = (0, 0)

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.is_open:
            self.is_open = False
            self._before = self.stats.saves, self.stats.full_saves
            super().on_train_batch_end(*args, **kwargs)

    @override
    def on_train_batch_start(self, *args: Any) -> None:
        saves, full_saves = self._before
        # Only a lazily staged save is not yet submitted when a batch begins.
        self.was_eager = self.stats.saves > saves and self.stats.full_saves == full_saves
        self._before = self.stats.saves, self.stats.full_saves

    def set_staging(self, staging: Literal["lazy", "eager"]) -> None:
        """Change an option that users set once, to measure both kinds of staging side by side on one store."""
        assert self._running is not None
        # In place, although it is frozen, because the whole engine shares the object.
        object.__setattr__(self._running.settings, "staging", staging)

    def wait(self) -> None:
        """Wait until everything is written and compacted."""
        assert self._running is not None
        self._running.fence()
        while self._running._writer.depth:
            time.sleep(0.001)


class SCAR:
    """``SCARCheckpoint`` in the Trainer's loop, with fsync.

    The first save is full, and there are two buffers; all kinds share them, so the first kind allocates them.

    Args:
        name: What to call it.
        callback: The callback; its hooks do everything.
        staging: How to stage.

    """

    is_slow = False

    def __init__(self, name: str, callback: GatedSCARCheckpoint, staging: Literal["lazy", "eager"]) -> None:
        self.name = name
        self.callback = callback
        self.warm_ups = 3 if staging == "lazy" else 1
        self._staging = staging
        self._fenced = False
        self.stalls: list[float] = []

    def save(self, trainer: pl.Trainer) -> None:
        self.callback.set_staging(self._staging)
        self.callback.is_open = True
        self._fenced = False

    def fence(self) -> None:
        if not self._fenced and self.callback.stats.saves > 1:
            assert self.callback.was_eager == (self._staging == "eager"), f"{self.name} was not staged as it says"
        self._fenced = True

    def wait(self) -> None:
        self.callback.wait()

    def discard(self, counts: bool) -> None:
        if counts:
            self.stalls.append(self.callback.stats.stall_seconds)

    def close(self) -> None:
        pass


def peers(folder: Path) -> list[Method]:
    """Return the methods that SCAR is compared with."""
    makers: list[Callable[[Path], Method]] = [Torch, Async, DCP, lambda path: DCP(path, overlapped=True)]
    return [make(folder) for make in makers]
