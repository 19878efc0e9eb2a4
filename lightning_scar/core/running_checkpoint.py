"""The running checkpoint: score, choose, stage, hand over.

A save goes through three methods, in this order: :meth:`RunningCheckpoint.save` takes the checkpoint apart and pickles
the skeleton, :meth:`RunningCheckpoint.stage` starts to score and copy, beside the next forward and backward if staging
is lazy, and :meth:`RunningCheckpoint.fence` waits for the copies before anything changes and hands them to the writer.
"""

import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self

from lightning_scar.core.blocks import BlockMap, build_map, rows
from lightning_scar.core.last_saved import NEVER, LastSaved
from lightning_scar.core.restoration import SKELETON, Restored, describe, restore
from lightning_scar.core.scoring import Choice, Scorer
from lightning_scar.core.settings import Settings
from lightning_scar.core.skeleton import Leaf, Path, identity, pack, take_apart
from lightning_scar.core.staging import StagedBlock, StagingBuffer, payload, stage
from lightning_scar.storage.delta import BlockData, Head, StorageError, Version
from lightning_scar.storage.index import Index
from lightning_scar.storage.owner import Ownership
from lightning_scar.storage.store import DeltaStore
from lightning_scar.storage.writer import DEPTH, BackgroundWriter


@dataclass
class Stats:
    """Counters of one run, for loggers and programs.

    Attributes:
        saves: Saves that were handed to the writer.
        full_saves: How many of them were full.
        skipped_saves: Partial saves left out because the writer was behind.
        failed_saves: Saves that could not be written.
        non_finite_blocks: Blocks of the last save that hold NaN or Inf and were not written over a good version.
        bytes_written: Bytes of all deltas written.
        stall_seconds: How long the training thread stood still for the last partial save, fence included.
        full_stall_seconds: The same for the last full save.
        distance: L2 distance between the live state and the running checkpoint after the last save.
        oldest_age: Steps since the oldest block that has changed was saved.
        queue_depth: Deltas waiting to be written when the last save was handed over.

    """

    saves: int = 0
    full_saves: int = 0
    skipped_saves: int = 0
    failed_saves: int = 0
    non_finite_blocks: int = 0
    bytes_written: int = 0
    stall_seconds: float = 0.0
    full_stall_seconds: float = 0.0
    distance: float = 0.0
    oldest_age: int = 0
    queue_depth: int = 0


@dataclass
class _Save:
    """One save on its way from the checkpoint dict to the writer."""

    version: Version
    full: bool
    info: dict[str, Any]
    skeleton: memoryview
    live: list[list[Tensor]]
    buffer: StagingBuffer
    choices: list[Choice] = field(default_factory=list)
    staged: list[StagedBlock] = field(default_factory=list)
    lazy: set[int] = field(default_factory=set)
    tensor_versions: dict[int, list[int]] = field(default_factory=dict)
    lazily: "Future[int] | None" = None
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
        self._signature: list[Any] = []
        self._last = LastSaved()
        self._scorer = Scorer(self.settings, self.store)
        self._caught: set[str] = set()
        self._failed: set[str] = set()
        self._save: _Save | None = None
        self._buffers = [StagingBuffer() for _ in range(DEPTH)]
        self._writer = BackgroundWriter()
        self._stager: ThreadPoolExecutor | None = None

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
        self._last.adopt(restored.map, restored.primary, {key: v.step for key, v in restored.versions.items()})
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
            info: Small facts to keep with the delta.

        Returns:
            Whether the save is on its way; a partial one is skipped, and counted, when the writer is behind.

        Raises:
            StorageError: If another run has taken the directory over.
            OSError: If an earlier write failed and ``on_write_error="raise"``.

        """
        self.fence()
        self._settle_failures()
        if self._ownership.lost:
            raise StorageError(f"another run has taken {self.store.directory} over; this one saves nothing any more")
        full = full or not self._has_base
        if not self._writer.reserve(wait=full):
            self.stats.skipped_saves += 1
            return False
        started = time.perf_counter()
        try:
            live, skeleton = self._take_apart(checkpoint, optimizers or {}, list(parameters))
        except BaseException:
            self._writer.give_back()
            raise
        # A full save gets memory of its own: a buffer of the whole state is not worth keeping.
        buffer = StagingBuffer() if full else self._buffers[self._sequence % DEPTH]
        if not full:
            buffer.reset()
        version = Version(self._incarnation, self._sequence, step)
        self._sequence += 1
        self._save = _Save(version, full, dict(info or {}), skeleton, live, buffer)
        self._save.stall += time.perf_counter() - started
        return True

    def stage(self) -> None:
        """Starts to score and copy the save that was begun; returns at once for what is staged lazily."""
        save = self._save
        if save is None or save.is_staged:
            return
        with self._standing_still(save):
            save.is_staged = True
            save.lazy = self._lazy_groups(save)
            save.tensor_versions = {g: _versions(save.live[g]) for g in save.lazy}
            eager = [g for g in range(len(save.live)) if g not in save.lazy]
            spent = self._score_and_copy(save, eager, self._budget(save, eager))
            if save.lazy:
                if self._stager is None:
                    self._stager = _one_thread()
                rest = int(self.settings.fraction * self._last.map.state_bytes) - spent
                save.lazily = self._stager.submit(self._score_and_copy, save, sorted(save.lazy), rest)
            else:
                self._hand_over(save)

    def fence(self) -> None:
        """Waits until the save under way is copied, and hands it to the writer. Cheap when there is none."""
        self.stage()
        save = self._save
        if save is None or save.lazily is None:
            return
        with self._standing_still(save):
            save.lazily.result()
            self._drop_torn(save)
            self._hand_over(save)

    def save_now(self, checkpoint: dict[str, Any], step: int, **options: Any) -> None:
        """Saves and waits until the copy is made; arguments as in :meth:`save`."""
        if self.save(checkpoint, step, **options):
            self.fence()

    def close(self) -> None:
        """Finishes what is under way, gives the directory back, and raises or warns about failed writes."""
        try:
            self.fence()
        finally:
            self._writer.drain()
            if self._stager is not None:
                self._stager.shutdown()
                self._stager = None
            self._ownership.release()
        self._settle_failures()

    # -- its parts -----------------------------------------------------------------------------------------------

    def _take_apart(
        self, checkpoint: dict[str, Any], optimizers: Mapping[Path, Optimizer], parameters: Sequence[Tensor]
    ) -> tuple[list[list[Tensor]], memoryview]:
        scalars = {identity(parameter): True for parameter in parameters if parameter.dim() == 0}
        tree, leaves = take_apart(checkpoint, scalars)
        signature = [(leaf.path, identity(leaf.tensor)) for leaf in leaves]
        by_path = {leaf.path: leaf.tensor for leaf in leaves}
        if signature != self._signature:
            block_map = self._build_map(checkpoint, leaves, optimizers, parameters)
            self._last.fit(block_map, _live(block_map, by_path))
            self._signature = signature
        block_map = self._last.map
        content = {"tree": tree, "groups": describe(block_map), "block_size": block_map.block_size}
        return _live(block_map, by_path), pack(content)

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
        size = self._last.map.block_size or self.settings.block_size
        return build_map(leaves, states, parameters, size)

    def _lazy_groups(self, save: _Save) -> set[int]:
        if save.full or self.settings.staging == "eager":
            return set()
        block_map, steps = self._last.map, self._last.steps
        return {
            g
            for g, group in enumerate(block_map.groups)
            if group.lazy
            and group.name not in self._caught
            and all(tensor.device.type == "cpu" for tensor in save.live[g])
            # A block without a version on disk must not be dropped, so it must not be torn.
            and bool((steps[block_map.offsets[g] : block_map.offsets[g + 1]] != NEVER).all())
        }

    def _budget(self, save: _Save, eager: Sequence[int]) -> int | None:
        """The share of the budget for what is staged eagerly."""
        if save.full:
            return None
        block_map = self._last.map
        total = int(self.settings.fraction * block_map.state_bytes)
        if not save.lazy:
            return total
        own = sum(group.rows * group.row_nbytes for group in (block_map.groups[g] for g in eager))
        # Running statistics and other buffers are small in bytes and in distance, and matter all the same: where they
        # fit in a quarter of the budget they are always fresh.
        return max(int(own * self.settings.fraction), min(own, total // 4))

    def _score_and_copy(self, save: _Save, groups: Sequence[int], budget: int | None) -> int:
        """Scores groups, chooses among their blocks and copies those; returns the bytes spent."""
        if not groups:
            return 0
        last = self._last
        choice = self._scorer.choose(last, save.live, groups, save.version.step, budget, set(self._failed))
        save.choices.append(choice)
        chosen = choice.by_group(last.map)
        save.buffer.reserve(choice.nbytes, sum(len(n) * len(last.map.groups[g].slots) for g, n in chosen.items()))
        for g, numbers in chosen.items():
            for staged in stage(save.buffer, last.map.groups[g], save.live[g], numbers):
                block = last.map.offsets[g] + staged.number
                if not staged.state_is_finite and last.steps[block] != NEVER:
                    choice.non_finite += 1
                    continue
                last.record(staged.group, staged.number, staged.copies[0], block, save.version.step)
                save.staged.append(staged)
        return choice.nbytes

    def _drop_torn(self, save: _Save) -> None:
        torn = {
            self._last.map.groups[g].name
            for g, versions in save.tensor_versions.items()
            if _versions(save.live[g]) != versions
        }
        if not torn:
            return
        # What changed outside the optimizer will do so again: from now on it is copied at once.
        self._caught |= torn
        self._failed |= {staged.key for staged in save.staged if staged.group.name in torn}
        save.staged = [staged for staged in save.staged if staged.group.name not in torn]

    def _hand_over(self, save: _Save) -> None:
        stats, choices = self.stats, save.choices
        stats.non_finite_blocks = sum(choice.non_finite for choice in choices)
        stats.distance = sum(choice.squared_rest for choice in choices) ** 0.5
        stats.oldest_age = max((choice.oldest_age for choice in choices), default=0)
        if stats.non_finite_blocks:
            self._warn_once(
                "non_finite",
                f"{stats.non_finite_blocks} blocks hold NaN or Inf at step {save.version.step}; their last good "
                "versions stay in the running checkpoint (counted as non_finite_blocks)",
            )
        stats.saves += 1
        complete = save.full and not stats.non_finite_blocks
        if complete:
            self._consistent = save.version
        stats.full_saves += save.full
        self._has_base = True
        head = self._head(save, "full" if complete else "partial")
        self._save = None
        self._writer.submit(lambda: self._write(head, save))
        stats.queue_depth = self._writer.depth

    def _head(self, save: _Save, kind: str) -> Head:
        info = {**save.info, "oldest_age": self.stats.oldest_age, "distance": self.stats.distance}
        return Head(
            incarnation=self._incarnation,
            lineage=self._lineage,
            sequence=save.version.sequence,
            step=save.version.step,
            rank=0,
            world_size=1,
            kind=kind,
            consistent=self._consistent,
            state_bytes=self._last.map.state_bytes + save.skeleton.nbytes,
            info=info,
        )

    def _write(self, head: Head, save: _Save) -> None:
        """Runs in the writer's thread."""
        keys = {staged.key for staged in save.staged}
        try:
            skeleton = torch.frombuffer(save.skeleton, dtype=torch.uint8)
            blocks = [staged.data(save.version) for staged in save.staged]
            blocks.append(BlockData(SKELETON, save.version, {"bytes": payload(skeleton, torch.uint8, skeleton.shape)}))
            self.stats.bytes_written += self.store.commit(head, blocks)
            self._failed -= keys
        except Exception:
            self.stats.failed_saves += 1
            self._failed |= keys
            raise

    def _settle_failures(self) -> None:
        """Raises or warns about failed writes, and forgets what they did not save."""
        if lost := [key for key in set(self._failed) if self.store.index.newest(key) is None]:
            self._last.forget(lost)
            self._has_base = self.store.index.newest(SKELETON) is not None
        errors = self._writer.take_errors()
        if errors and self.settings.on_write_error == "raise":
            raise errors[0]
        if errors:
            self._warn_once(
                "write_error",
                f"a save to {self.store.directory} failed, training goes on without it: {errors[0]!r}. Further "
                "failures are counted as failed_saves",
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
            field_name = "full_stall_seconds" if save.full else "stall_seconds"
            setattr(self.stats, field_name, save.stall)


def _live(block_map: BlockMap, by_path: Mapping[Path, Tensor]) -> list[list[Tensor]]:
    return [[rows(by_path[slot.paths[0]]) for slot in group.slots] for group in block_map.groups]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors]


def _one_thread() -> ThreadPoolExecutor:
    """A thread whose torch operations use one core, so that it does not fight with the training for all of them."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, "scar-stager", initializer=torch.set_num_threads, initargs=(1,))
    pool.submit(int).result()
    # The number holds for the thread that set it, but is also what later threads begin with.
    torch.set_num_threads(threads)
    return pool
