"""A running checkpoint read back: every block from its newest intact version, put together with the skeleton."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_scar.core.blocks import BlockMap, Group, Slot
from lightning_scar.core.memory import memory
from lightning_scar.core.skeleton import Path, put_together, take_apart, unpack
from lightning_scar.storage.collection import no_collection
from lightning_scar.storage.delta import StorageError, Version
from lightning_scar.storage.index import Located
from lightning_scar.storage.store import Damage, DeltaStore, Reading, retry_vanished

SKELETON = "skeleton"


class NoCheckpointError(StorageError):
    """The directory holds no running checkpoint."""


class IncompleteError(StorageError):
    """No intact version of some block is left."""


@dataclass
class Restored:
    """What a directory held.

    Attributes:
        checkpoint: The checkpoint dict; its tensors are on the CPU.
        step: The optimizer step of its newest save.
        map: The block map it was saved with.
        versions: The version that each block was read from.
        primary: For each group the tensor whose distance counts (the one in ``checkpoint``, not a copy).
        damaged: What had to be passed over.
        info: What the newest save said about itself.

    """

    checkpoint: dict[str, Any]
    step: int
    map: BlockMap
    versions: dict[str, Version]
    primary: dict[str, Tensor]
    damaged: list[tuple[Located, Damage]]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def oldest_age(self) -> int:
        """Steps between the newest save and the oldest block that had changed since it was saved."""
        age: int = self.info.get("oldest_age", 0)
        return age


def describe(block_map: BlockMap) -> str:
    """A block map as JSON, for the skeleton."""
    groups = [
        (g.name, g.shape, g.rows_per_block, [(s.name, str(s.dtype), s.stride, s.paths) for s in g.slots])
        for g in block_map.groups
    ]
    return json.dumps({"block_size": block_map.block_size, "groups": groups})


def parse(text: str) -> BlockMap:
    """The inverse of :func:`describe`."""

    def slot(name: str, dtype: str, stride: list[int] | None, paths: list[Any]) -> Slot:
        layout = tuple(stride) if stride is not None else None
        return Slot(name, getattr(torch, dtype.removeprefix("torch.")), layout, tuple(map(tuple, paths)))

    content = json.loads(text)
    groups = (
        Group(name, tuple(shape), tuple(slot(*s) for s in slots), size)
        for name, shape, size, slots in content["groups"]
    )
    return BlockMap(tuple(groups), content["block_size"])


def load(
    url: str | os.PathLike[str],
    *,
    consistent: bool = False,
    into: dict[str, Any] | None = None,
    map_location: Any = None,
    weights_only: bool | None = None,
    storage_options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Loads a running checkpoint as the checkpoint dict that was saved.

    Args:
        url: The directory, any fsspec URL.
        consistent: Whether to read the newest full save, all blocks of one step, rather than the newest version of
            every block.
        into: A checkpoint dict of live tensors, e.g. ``{"state_dict": model.state_dict()}``. Tensors of equal place,
            shape and dtype are filled in place and returned, so that the state is never in memory twice.
        map_location: A device or device name to move the tensors to; ``None`` leaves them on the CPU.
        weights_only: As in ``torch.load``, for the skeleton. Tensors are never unpickled.
        storage_options: Passed to the file system.

    Returns:
        The dict, e.g. for ``LightningModule.load_state_dict(load(dir)["state_dict"])``.

    Raises:
        NoCheckpointError: If there is no running checkpoint, or no full save for ``consistent``.
        IncompleteError: If no intact version of some block is left; the blocks are named.
        NewerFormatError: If a newer version of this library wrote it.

    Example::

        >>> from lightning_scar.core.running_checkpoint import RunningCheckpoint
        >>> with RunningCheckpoint("memory://load-example") as running:
        ...     running.save_now({"state_dict": {"weight": torch.ones(2)}}, step=1)
        >>> load("memory://load-example")
        {'state_dict': {'weight': tensor([1., 1.])}}

    """
    store = DeltaStore(url, storage_options)
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
    """Whether a path is the directory of a running checkpoint (files and other directories are not)."""
    if FilePath(os.fspath(url)).is_file():
        return False
    return not DeltaStore(url, storage_options).is_empty()


def restore(
    store: DeltaStore,
    *,
    consistent: bool = False,
    into: dict[str, Any] | None = None,
    weights_only: bool | None = None,
) -> Restored:
    """Reads the running checkpoint of a store; see :func:`load` for arguments and errors."""
    live = {leaf.path: leaf.tensor for leaf in take_apart(into, {})[1]} if into else {}
    with no_collection():
        restored = retry_vanished(lambda: _restore(store, consistent, live, weights_only))
    damages = [*store.damaged, *(damage for _, damage in restored.damaged)]
    if damages:
        # Several thousand blocks may lie in one lost file: name the first, count the rest.
        shown = "\n  ".join(map(str, damages[:8])) + (f"\n  and {len(damages) - 8} more" * (len(damages) > 8))
        warnings.warn(
            f"{store.directory} is damaged; older versions are used instead of\n  {shown}\n"
            "`lightning-scar verify` lists all damage.",
            stacklevel=3,
        )
    return restored


def _restore(store: DeltaStore, consistent: bool, live: dict[Path, Tensor], weights_only: bool | None) -> Restored:
    store.refresh()
    index = store.index
    if not list(index.keys()):
        reasons = "".join(f"\n  {damage}" for damage in store.damaged)
        raise NoCheckpointError(f"{store.directory} holds no running checkpoint{reasons}")
    limit = index.consistent if consistent else None
    if consistent and limit is None:
        raise NoCheckpointError(
            f"{store.directory} holds no complete full save to read a consistent state from; "
            "set full_every_n_saves, or read without `consistent`"
        )
    reader = _Reader(store, limit)
    content, at = reader.skeleton(weights_only)
    block_map = parse(content["map"])
    tensors = reader.groups(block_map, live)
    leaves = {
        path: tensor
        for group, slots in zip(block_map.groups, tensors, strict=True)
        for slot, tensor in zip(group.slots, slots, strict=True)
        for path in slot.paths
    }
    return Restored(
        checkpoint=put_together(content["skeleton"], leaves),
        step=at.block.version.step,
        map=block_map,
        versions=reader.versions,
        primary={group.name: slots[0] for group, slots in zip(block_map.groups, tensors, strict=True)},
        damaged=reader.damaged,
        info=dict(at.delta.head.info),
    )


class _Reader:
    """Reads blocks from their newest intact version."""

    def __init__(self, store: DeltaStore, limit: Version | None) -> None:
        self._store = store
        self._limit = limit
        self.versions: dict[str, Version] = {}
        self.damaged: list[tuple[Located, Damage]] = []

    def _candidates(self, key: str) -> list[Located]:
        bad = [located for located, _ in self.damaged]
        found = (
            [at for at in self._store.index.versions(key) if at not in bad] if bad else self._store.index.versions(key)
        )
        return found if self._limit is None else [at for at in found if at.block.version <= self._limit]

    def skeleton(self, weights_only: bool | None) -> tuple[dict[str, Any], Located]:
        while candidates := self._candidates(SKELETON):
            at = candidates[0]
            memory = at.block.new_memory()
            if not self._note_damage(self._store.read([Reading(at, memory.copy)])):
                return unpack(memory["bytes"], weights_only), at
        raise IncompleteError(f"{self._store.directory} holds no intact skeleton: every version of it is damaged")

    def groups(self, block_map: BlockMap, live: Mapping[Path, Tensor]) -> list[list[Tensor]]:
        """Reads every block of a map; returns the tensors of each group, one a slot."""
        targets = [[_target(group, slot, live) for slot in group.slots] for group in block_map.groups]
        memories = [_Memory(group, by_slot) for group, by_slot in zip(block_map.groups, targets, strict=True)]
        wanted = [(g, i) for g, group in enumerate(block_map.groups) for i in range(len(group))]
        while wanted:
            found = {block_map.groups[g].key(i): (g, i) for g, i in wanted}
            readings = [Reading(self._newest(key), partial(memories[g].block, i)) for key, (g, i) in found.items()]
            self.versions |= {at.block.key: at.block.version for at, _ in readings}
            wanted = [found[key] for key in self._note_damage(self._store.read(readings))]
        return [[target.filled() for target in by_slot] for by_slot in targets]

    def _newest(self, key: str) -> Located:
        for at in self._candidates(key):
            return at
        raise IncompleteError(
            f"{self._store.directory} holds no intact version of block {key}; it is not filled with initial values. "
            "`lightning-scar verify` lists all damage; an older copy of the directory may hold what is missing."
        )

    def _note_damage(self, found: list[tuple[Reading, Damage]]) -> list[str]:
        self.damaged += [(reading.located, damage) for reading, damage in found]
        return [reading.located.block.key for reading, _ in found]


class _Target(NamedTuple):
    """Where a slot is read to, and the tensor that it is for, if that is another one."""

    dense: Tensor
    tensor: Tensor | None

    def filled(self) -> Tensor:
        return self.dense if self.tensor is None else self.tensor.copy_(self.dense)


class _Memory:
    """The memory that a group is read to, block by block."""

    def __init__(self, group: Group, targets: Sequence[_Target]) -> None:
        self._span = group.span
        self._slots = [
            (slot.name, memory(target.dense), group.row_numel * slot.dtype.itemsize)
            for slot, target in zip(group.slots, targets, strict=True)
        ]

    def block(self, i: int) -> dict[str, memoryview]:
        """The bytes of block ``i``, slot by slot."""
        start, stop = self._span(i)
        return {name: whole[start * size : stop * size] for name, whole, size in self._slots}


def _target(group: Group, slot: Slot, live: Mapping[Path, Tensor]) -> _Target:
    given = next((live[path] for path in slot.paths if path in live), None)
    if given is not None and (tuple(given.shape), given.dtype) == (group.shape, slot.dtype):
        direct = given.is_contiguous() and given.device.type == "cpu"
        return _Target(given, None) if direct else _Target(torch.empty(group.shape, dtype=slot.dtype), given)
    laid_out = torch.empty_strided(group.shape, slot.stride, dtype=slot.dtype) if slot.stride else None
    return _Target(torch.empty(group.shape, dtype=slot.dtype), laid_out)
