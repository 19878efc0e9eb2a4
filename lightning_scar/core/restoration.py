"""Loads a running checkpoint: every block from its newest intact version, combined with the skeleton."""

import os
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor

from lightning_scar.core.blocks import BlockMap
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.reader import Reader, initial_value, uncompiled
from lightning_scar.core.recovery import IncompleteError, RecoveryPlan
from lightning_scar.core.skeleton import Path, put_together, take_apart
from lightning_scar.core.skeletons import Skeletons, Stored, describe, put_shards_together, union
from lightning_scar.storage.delta import StorageError
from lightning_scar.storage.garbage import no_garbage_collection
from lightning_scar.storage.head import Mark
from lightning_scar.storage.index import Located
from lightning_scar.storage.places import open_store
from lightning_scar.storage.reading import Damage
from lightning_scar.storage.store import DeltaStore, retry_vanished


class NoCheckpointError(StorageError):
    """The directory holds no running checkpoint."""


@dataclass
class Restored:
    """A restored running checkpoint.

    Attributes:
        checkpoint: The checkpoint dict; its tensors are on the CPU.
        own: The checkpoint as this rank saved it, without large tensors, if that was at the same step.
        step: The optimizer step of the newest save.
        map: The block map it was saved with.
        plan: The source of each block.
        bases: A copy of the exact values of each group's first slot, if requested.
        negative: Whether a slot can hold negative values, by the names of group and slot, as far as refreshes tell.
        damages: Damaged versions that were skipped.
        unrefreshed: Damaged refreshes.

    """

    checkpoint: dict[str, Any]
    own: Any
    step: int
    map: BlockMap
    plan: RecoveryPlan
    bases: dict[str, Tensor]
    negative: dict[tuple[str, str], bool]
    damages: list[tuple[Located, Damage]]
    unrefreshed: list[Damage]

    @property
    def world_size(self) -> int:
        """The number of ranks that saved it last."""
        return next(iter(self.plan.heads.values())).world_size

    @property
    def oldest_age(self) -> int:
        """The age, at the newest save, of the oldest block that had changed since it was written exactly."""
        return max((head.info.get("oldest_age", 0) for head in self.plan.heads.values()), default=0)


def load(
    url: str | os.PathLike[str],
    *,
    consistent: bool = False,
    into: dict[str, Any] | None = None,
    map_location: Any = None,
    weights_only: bool | None = None,
    storage_options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Load a running checkpoint as the checkpoint dict that was saved.

    Args:
        url: The directory, any fsspec URL.
        consistent: Whether to read the newest full save, with all blocks of one step, instead of the newest version of
            every block.
        into: A checkpoint dict of live tensors, e.g. ``{"state_dict": model.state_dict()}``. Tensors with the same
            place, shape and dtype are filled in place and returned, so the state is never in memory twice.
        map_location: A device or device name to move the tensors to; ``None`` leaves them on the CPU.
        weights_only: As in ``torch.load``, for the skeleton. Tensors are never unpickled.
        storage_options: Passed to the file system.

    Returns:
        The dict, e.g. for ``LightningModule.load_state_dict(load(dir)["state_dict"])``.

    Raises:
        NoCheckpointError: If there is no running checkpoint, or no full save for ``consistent``.
        IncompleteError: If a block has no intact version left; the message names it.
        NewerFormatError: If a newer version of this library wrote it.

    Example::

        >>> import torch
        >>> from lightning_scar.core.running_checkpoint import RunningCheckpoint
        >>> with RunningCheckpoint("memory://load-example") as running:
        ...     running.save_now({"state_dict": {"weight": torch.ones(2)}}, step=1)
        >>> load("memory://load-example")
        {'state_dict': {'weight': tensor([1., 1.])}}

    """
    store = open_store(url, storage_options)
    restored = restore(store, consistent=consistent, into=into, weights_only=weights_only)
    if map_location is None:
        return restored.checkpoint
    return _moved(restored.checkpoint, map_location)


def _moved(checkpoint: dict[str, Any], map_location: Any) -> dict[str, Any]:
    from torch.utils._pytree import tree_map_only

    if isinstance(map_location, dict):
        map_location = map_location.get("cpu", "cpu")
    move = (lambda t: map_location(t, "cpu")) if callable(map_location) else (lambda t: t.to(map_location))
    moved: dict[str, Any] = tree_map_only(Tensor, move, checkpoint)
    return moved


def is_running_checkpoint(url: str | os.PathLike[str], storage_options: dict[str, Any] | None = None) -> bool:
    """Return whether a path is the directory of a running checkpoint."""
    if FilePath(os.fspath(url)).is_file():
        return False
    return not open_store(url, storage_options).is_empty()


def restore(
    store: DeltaStore,
    *,
    consistent: bool = False,
    into: dict[str, Any] | None = None,
    initial: dict[str, Any] | None = None,
    weights_only: bool | None = None,
    ranks: Ranks | None = None,
    with_bases: bool = False,
) -> Restored:
    """Read the running checkpoint of a store; see :func:`load` for arguments and errors.

    With several ranks a collective: each reads its share and receives the rest from the others.

    Args:
        store: The store.
        consistent: As in :func:`load`.
        into: As in :func:`load`.
        initial: A checkpoint dict of initial values for blocks that have no version left; their optimizer state starts
            at zero.
        weights_only: As in :func:`load`.
        ranks: The ranks that restore together.
        with_bases: Whether to return the bases, so that saves can continue.

    """
    members = ranks or Ranks()

    def attempt() -> Restored:
        found = members.together(lambda: _look(store, consistent, into, initial, weights_only, members))
        _check_agreement(store, found, members)
        if not consistent:
            # Refreshes are newer than a full save.
            found.reader.read_refreshes()
        members.together(found.reader.read)
        found.reader.exchange()
        bases = found.reader.bases() if with_bases else {}
        if not consistent:
            found.reader.refresh()
        return found.put_together(bases)

    with no_garbage_collection():
        # A live run may delete a file while another process reads.
        restored = retry_vanished(attempt)
    if members.rank == 0:
        _report(store, restored)
    return restored


@dataclass
class _Found:
    """What one rank finds on disk."""

    newest: Stored
    all_ranks: list[Stored]
    own: Stored | None
    map: BlockMap
    plan: RecoveryPlan
    reader: Reader
    damages: list[tuple[Located, Damage]]

    def put_together(self, bases: dict[str, Tensor]) -> Restored:
        tensors = self.reader.tensors()
        leaves = {
            path: tensor
            for group, slots in zip(self.map.groups, tensors, strict=True)
            for slot, tensor in zip(group.slots, slots, strict=True)
            for path in slot.paths
        }
        parts = [put_together(stored.skeleton, leaves) for stored in [*self.all_ranks, self.newest]]
        version = self.newest.at.block.version
        is_as_new = self.own is not None and self.own.at.block.version.mark == version.mark
        return Restored(
            checkpoint=put_shards_together(parts, self.newest.sharded),
            own=put_together(self.own.skeleton, {}) if self.own is not None and is_as_new else None,
            step=version.step,
            map=self.map,
            plan=self.plan,
            bases=bases,
            negative=self.reader.negative,
            damages=[*self.damages, *self.plan.damages],
            unrefreshed=self.reader.unrefreshed,
        )


def _look(
    store: DeltaStore,
    consistent: bool,
    into: dict[str, Any] | None,
    initial: dict[str, Any] | None,
    weights_only: bool | None,
    ranks: Ranks,
) -> _Found:
    store.refresh()
    limit = _limit(store, consistent)
    skeletons = Skeletons(store, limit, weights_only)
    newest = skeletons.newest()
    all_ranks = _shards(store, skeletons, newest, ranks) if newest.sharded else []
    block_map = union([newest.map, *(stored.map for stored in all_ranks)])
    start = {uncompiled(path): tensor for path, tensor in _tensors(initial).items()}
    known = {group.name for group in block_map.groups if initial_value(group, start) is not None}
    plan = RecoveryPlan(block_map, store.index, initial=known, limit=limit)
    reader = Reader(store, block_map, plan, ranks, into=_tensors(into), initial=start)
    own = skeletons.of_rank(ranks.rank) if ranks.world_size > 1 else newest
    return _Found(newest, all_ranks, own, block_map, plan, reader, skeletons.damages)


def _tensors(checkpoint: dict[str, Any] | None) -> dict[Path, Tensor]:
    return {leaf.path: leaf.tensor for leaf in take_apart(checkpoint, {})[1]} if checkpoint else {}


def _limit(store: DeltaStore, consistent: bool) -> Mark | None:
    if not list(store.index.keys()):
        reasons = "".join(f"\n  {damage}" for damage in store.damaged)
        raise NoCheckpointError(f"{store.directory} holds no running checkpoint{reasons}")
    if consistent and store.index.consistent is None:
        raise NoCheckpointError(
            f"{store.directory} holds no complete full save to read a consistent state from; "
            "set full_every_n_saves, or read without `consistent`"
        )
    return store.index.consistent if consistent else None


def _shards(store: DeltaStore, skeletons: Skeletons, newest: Stored, ranks: Ranks) -> list[Stored]:
    found = skeletons.of_all_starts()
    world_size = newest.at.delta.head.world_size
    missing = set(range(world_size)) - {stored.rank for stored in found}
    if any(map(partial(_is_complete, store, found), store.index.lineage)):
        # A rank that has not saved since the last start has its shard in the saves of an earlier, complete start.
        missing = set()
    if missing and ranks.world_size != world_size:
        raise IncompleteError(
            f"the optimizer state was sharded over {world_size} ranks, {len(missing)} of which left nothing intact "
            f"(rank {', '.join(map(str, sorted(missing)))}), so it cannot be resharded to {ranks.world_size}. "
            f"Resume on {world_size} ranks: the lost shard is initialized again, and the next save is complete."
        )
    return found


def _is_complete(store: DeltaStore, found: list[Stored], incarnation: int) -> bool:
    """Return whether the skeletons of all ranks of one start exist."""
    sizes = {delta.head.world_size for delta in store.deltas if delta.head.incarnation == incarnation}
    ranks = {stored.rank for stored in found if stored.at.block.version.incarnation == incarnation}
    return any(ranks >= set(range(size)) for size in sizes)


def _check_agreement(store: DeltaStore, found: _Found, ranks: Ranks) -> None:
    # Do not compare file names: one host may have merged files that another has not.
    newest = found.newest.at.block
    seen = (f"{newest.key} of step {newest.version.step}", len(store.deltas), describe(found.map), newest.version)
    for rank, other in enumerate(ranks.gather(seen)):
        if other != seen:
            raise StorageError(
                f"rank {ranks.rank} sees {seen[1]} deltas in {store.directory}, the newest {seen[0]}; rank {rank} sees "
                f"{other[1]}, the newest {other[0]}. All ranks need the same directory, on a shared file system."
            )


def _report(store: DeltaStore, restored: Restored) -> None:
    damages = [*store.damaged, *(damage for _, damage in restored.damages), *restored.unrefreshed]
    # One lost file may hold thousands of blocks: list the first, count the rest.
    shown = "\n  ".join(map(str, damages[:8])) + (f"\n  and {len(damages) - 8} more" * (len(damages) > 8))
    if damages or not restored.plan.is_whole:
        what = f"is damaged; copies or older versions are used instead of\n  {shown}" if damages else "is incomplete."
        missing = "".join(f"\nNothing is left in {store.directory.file(folder)}." for folder in store.missing_folders())
        warnings.warn(
            f"{store.directory} {what}{missing}\nRecovery: {restored.plan}\n`lightning-scar verify` lists all damage.",
            stacklevel=4,
        )
