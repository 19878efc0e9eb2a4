"""The running checkpoint: score, choose, stage, hand over.

A save goes through three methods, in this order: :meth:`RunningCheckpoint.save` takes the checkpoint apart and pickles
the skeleton, :meth:`RunningCheckpoint.stage` starts to score and copy, beside the next forward and backward if staging
is lazy, and :meth:`RunningCheckpoint.fence` waits for the copies before anything changes and hands them to the writer.
"""

import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self

from lightning_scar.core.blocks import BlockMap, build_map, rows
from lightning_scar.core.restoration import SKELETON, Restored, describe, restore
from lightning_scar.core.settings import Settings
from lightning_scar.core.skeleton import Leaf, Path, identity, pack, take_apart
from lightning_scar.core.stager import Stager, Staging
from lightning_scar.core.staging import StagingBuffer, payload
from lightning_scar.core.stats import Stats
from lightning_scar.storage.delta import BlockData, Head, StorageError, Version
from lightning_scar.storage.index import Index
from lightning_scar.storage.owner import Ownership
from lightning_scar.storage.store import DeltaStore
from lightning_scar.storage.writer import DEPTH, BackgroundWriter


@dataclass
class _Save:
    """One save on its way from the checkpoint dict to the writer."""

    version: Version
    skeleton: memoryview
    info: dict[str, Any]
    staging: Staging
    is_staged: bool = False
    stall: float = 0.0


class RunningCheckpoint:
    """A running checkpoint that a live training writes to.

    Args:
        url: Its directory, any fsspec URL.
        settings: What to save and how.
        storage_options: Passed to the file system.

    Raises:
        StorageError: If the directory holds something else.
        DirectoryInUseError: If another live run owns it.
        OSError: If it cannot be written to.

    Example::

        >>> from lightning_scar import load
        >>> weight = torch.zeros(4)
        >>> with RunningCheckpoint("memory://running-example", Settings(fraction=1.0)) as running:
        ...     for step in (1, 2):
        ...         weight += 1
        ...         running.save_now({"state_dict": {"weight": weight}}, step)
        >>> load("memory://running-example")["state_dict"]["weight"]
        tensor([2., 2., 2., 2.])

    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        settings: Settings | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.store = DeltaStore(url, storage_options)
        self.stats = Stats()
        if foreign := self.store.foreign_names():
            raise StorageError(
                f"{self.store.directory} holds something else than a running checkpoint ({', '.join(foreign[:3])}"
                f"{', ...' if len(foreign) > 3 else ''}). Choose an empty or new directory."
            )
        self.store.refresh()
        self._warned: set[str] = set()
        self._ownership = Ownership(self.store.directory)
        self._take_directory()
        self._incarnation = 1 + max((delta.head.incarnation for delta in self.store.deltas), default=0)
        self._lineage: tuple[int, ...] = (self._incarnation,)
        # Until its first save is durable a fresh incarnation has no versions; the older training's do not count for it.
        self.store.index = Index(self._lineage)
        self._sequence = 0
        self.restored_age = 0
        self._has_base = False
        self._consistent: Version | None = None
        self._signature: list[Any] | None = None
        self._described = ""
        self._save: _Save | None = None
        self._stager = Stager(self.settings, self.store)
        self._buffers = [StagingBuffer() for _ in range(DEPTH)]
        self._writer = BackgroundWriter()

    def __enter__(self) -> Self:
        """Returns itself; the end of the block closes it."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes it."""
        self.close()

    def _take_directory(self) -> None:
        try:
            self._ownership.acquire()
        except OSError as error:
            if self.settings.on_write_error == "raise":
                raise
            self._warn_once("write_error", f"{self.store.directory} cannot be written to: {error!r}. Training goes on")
            return
        self.store.directory.child(self.store.folder).sweep()
        self.store.refresh()

    def restore(self, weights_only: bool | None = None) -> Restored:
        """Reads what the directory holds; saves from now on continue it.

        Args:
            weights_only: As in ``torch.load``, for the skeleton.

        Raises:
            NoCheckpointError: If there is nothing to restore.
            IncompleteError: If no intact version of some block is left.

        """
        restored = restore(self.store, weights_only=weights_only)
        self._lineage = (*self.store.index.lineage, self._incarnation)
        self.store.index = Index(self._lineage, self.store.deltas)
        for located, _ in restored.damaged:
            self.store.index.discard(located)
        self._consistent = self.store.index.consistent
        self.restored_age = restored.oldest_age
        self._has_base = True
        steps = {key: version.step for key, version in restored.versions.items()}
        self._stager.last.adopt(restored.map, restored.primary, steps)
        if self.settings.block_size not in (None, restored.map.block_size):
            self._warn_once(
                "block_size",
                f"block_size={self.settings.block_size} is left aside: {self.store.directory} was started with "
                f"{restored.map.block_size}. Begin in a new directory to change it.",
            )
        return restored

    # -- a save --------------------------------------------------------------------------------------------------

    def save(
        self,
        checkpoint: dict[str, Any],
        step: int,
        *,
        optimizers: Mapping[Path, Optimizer] | None = None,
        parameters: Iterable[Tensor] = (),
        full: bool = False,
        wait: bool = False,
        info: Mapping[str, Any] | None = None,
    ) -> bool:
        """Begins a save: takes the checkpoint apart and pickles the skeleton. :meth:`stage` must follow.

        Args:
            checkpoint: The checkpoint dict, with references to live tensors.
            step: The optimizer step that it belongs to.
            optimizers: The live optimizer for each place of an optimizer's state in the checkpoint, e.g.
                ``{("optimizer_states", 0): optimizer}``; pairs optimizer state with parameters.
            parameters: Tensors that change at optimizer steps only, and may be staged lazily.
            full: Whether to save every block that has changed. The first save always does.
            wait: Whether to wait when the writer is behind, rather than skip the save. A full save always waits.
            info: Small facts to keep with the delta.

        Returns:
            Whether the save is on its way; ``False`` for one that was skipped, which is counted.

        Raises:
            StorageError: If another run has taken the directory over.
            OSError: If an earlier write failed and ``on_write_error="raise"``.

        """
        self.fence()
        self._settle_failures()
        if self._ownership.lost:
            raise StorageError(f"another run has taken {self.store.directory} over; this one saves nothing any more")
        full = full or not self._has_base
        if not self._writer.reserve(wait=wait or full):
            self.stats.skipped_saves += 1
            return False
        started = time.perf_counter()
        try:
            live, skeleton = self._take_apart(checkpoint, optimizers or {}, list(parameters))
        except BaseException:
            self._writer.give_back()
            raise
        version = Version(self._incarnation, self._sequence, step)
        self._save = _Save(version, skeleton, dict(info or {}), Staging(step, full, live, self._buffer(full)))
        self._sequence += 1
        self._save.stall += time.perf_counter() - started
        return True

    def stage(self) -> None:
        """Starts to score and copy the save that was begun; returns at once for what is staged lazily."""
        save = self._save
        if save is None or save.is_staged:
            return
        with self._standing_still(save):
            save.is_staged = True
            self._stager.start(save.staging)
            if save.staging.lazily is None:
                self._hand_over(save)

    def fence(self) -> None:
        """Waits until the save under way is copied, and hands it to the writer. Cheap when there is none."""
        self.stage()
        save = self._save
        if save is None:
            return
        with self._standing_still(save):
            self._stager.finish(save.staging)
            self._hand_over(save)

    def save_now(self, checkpoint: dict[str, Any], step: int, **options: Any) -> None:
        """Saves and returns when the copy is made; arguments as in :meth:`save`. Never skipped."""
        self.save(checkpoint, step, wait=True, **options)
        self.fence()

    def close(self) -> None:
        """Finishes what is under way, gives the directory back, and raises or warns about failed writes."""
        try:
            self.fence()
        finally:
            self._stager.close()
            self._writer.drain()
            self._ownership.release()
        self._settle_failures()

    # -- its parts -----------------------------------------------------------------------------------------------

    def _take_apart(
        self, checkpoint: dict[str, Any], optimizers: Mapping[Path, Optimizer], parameters: Sequence[Tensor]
    ) -> tuple[list[list[Tensor]], memoryview]:
        scalars = {identity(parameter): True for parameter in parameters if parameter.dim() == 0}
        skeleton, leaves = take_apart(checkpoint, scalars)
        signature = [(leaf.path, identity(leaf.tensor)) for leaf in leaves]
        by_path = {leaf.path: leaf.tensor for leaf in leaves}
        if signature != self._signature:
            block_map = self._build_map(checkpoint, leaves, optimizers, parameters)
            self._stager.fit(block_map, _live(block_map, by_path))
            self._signature, self._described = signature, describe(block_map)
        return _live(self._stager.last.map, by_path), pack({"skeleton": skeleton, "map": self._described})

    def _build_map(
        self,
        checkpoint: dict[str, Any],
        leaves: list[Leaf],
        optimizers: Mapping[Path, Optimizer],
        parameters: Sequence[Tensor],
    ) -> BlockMap:
        states = {}
        for path, optimizer in optimizers.items():
            state: Any = checkpoint
            for key in path:
                state = state[key]
            states[path] = (optimizer, state)
        size = self._stager.last.map.block_size or self.settings.block_size
        return build_map(leaves, states, parameters, size)

    def _buffer(self, full: bool) -> StagingBuffer:
        if full:
            # Memory of its own: a buffer of the whole state is not worth keeping.
            return StagingBuffer()
        # The writer has a free place, so it is done with the save before the last, whose buffer this was.
        buffer = self._buffers[self._sequence % DEPTH]
        buffer.reset()
        return buffer

    def _hand_over(self, save: _Save) -> None:
        stats, staging = self.stats, save.staging
        stats.saves += 1
        stats.full_saves += staging.full
        stats.step = staging.step
        stats.non_finite_blocks = staging.non_finite
        stats.distance = staging.distance
        stats.oldest_age = staging.oldest_age
        self._warn_of_non_finite()
        self._has_base = True
        self._save = None
        self._writer.submit(lambda: self._write(save))
        stats.queue_depth = self._writer.depth

    def _write(self, save: _Save) -> None:
        """Runs in the writer's thread."""
        blocks = [block for staged in save.staging.groups for block in staged.blocks()]
        # Of the parameters it is known; optimizer state is looked at here, where nobody waits.
        bad = {block.key for block in blocks if not block.state_is_finite and self._is_stored(block.key)}
        keys = {block.key for block in blocks}
        self._stager.fail(bad, save.version.step)
        self.stats.non_finite_blocks += len(bad)
        head = self._head(save, complete=save.staging.full and not save.staging.non_finite and not bad)
        try:
            if not all(self._is_stored(key) for key in set(self._stager.failed) - keys):
                raise StorageError("an earlier save failed, without whose blocks this one would have holes")
            data = [block.data(save.version) for block in blocks if block.key not in bad]
            skeleton = torch.frombuffer(save.skeleton, dtype=torch.uint8)
            data.append(BlockData(SKELETON, save.version, {"bytes": payload(skeleton, torch.uint8, skeleton.shape)}))
            self.stats.bytes_written += self.store.commit(head, data)
        except Exception:
            self.stats.failed_saves += 1
            self._stager.fail(keys, save.version.step)
            raise
        self._stager.succeed(keys - bad, save.version.step)
        self._consistent = head.consistent

    def _head(self, save: _Save, complete: bool) -> Head:
        return Head(
            incarnation=self._incarnation,
            lineage=self._lineage,
            sequence=save.version.sequence,
            step=save.version.step,
            rank=0,
            world_size=1,
            kind="full" if complete else "partial",
            consistent=save.version if complete else self._consistent,
            state_bytes=self._stager.last.map.state_bytes + save.skeleton.nbytes,
            info={**save.info, "oldest_age": save.staging.oldest_age, "distance": save.staging.distance},
        )

    def _settle_failures(self) -> None:
        """Raises or warns about failed writes, and forgets what they did not save."""
        if lost := [key for key in set(self._stager.failed) if not self._is_stored(key)]:
            self._stager.forget(lost)
            self._has_base = self.store.index.newest(SKELETON) is not None
        self._warn_of_non_finite()
        errors = self._writer.take_errors()
        if errors and self.settings.on_write_error == "raise":
            raise errors[0]
        if errors:
            self._warn_once(
                "write_error",
                f"a save to {self.store.directory} failed, training goes on without it: {errors[0]!r}. Further "
                "failures are counted as failed_saves",
            )

    def _is_stored(self, key: str) -> bool:
        """Whether some version of a block is on disk, with all the slots that it has now."""
        block_map, stored = self._stager.last.map, self.store.index.newest(key)
        if key not in block_map.numbers:
            return True  # Nobody will ask for it.
        group = block_map.groups[block_map.locate(block_map.numbers[key])[0]]
        return stored is not None and set(stored.slots) == {slot.name for slot in group.slots}

    def _warn_of_non_finite(self) -> None:
        if self.stats.non_finite_blocks:
            self._warn_once(
                "non_finite",
                f"{self.stats.non_finite_blocks} blocks hold NaN or Inf at step {self.stats.step}; their last good "
                "versions stay in the running checkpoint (counted as non_finite_blocks)",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"lightning-scar: {message}", stacklevel=4)

    @contextmanager
    def _standing_still(self, save: _Save) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except BaseException:
            # The error is the caller's to see; the next save begins anew.
            self._save = None
            self._writer.give_back()
            raise
        save.stall += time.perf_counter() - started
        if self._save is None:
            name = "full_stall_seconds" if save.staging.full else "stall_seconds"
            setattr(self.stats, name, save.stall)


def _live(block_map: BlockMap, by_path: Mapping[Path, Tensor]) -> list[list[Tensor]]:
    return [[rows(by_path[slot.paths[0]]) for slot in group.slots] for group in block_map.groups]
