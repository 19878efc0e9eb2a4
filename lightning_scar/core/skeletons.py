"""The skeletons of all ranks on disk, and how their shards are combined."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lightning_scar.core.blocks import BlockMap, Group, Slot
from lightning_scar.core.recovery import IncompleteError
from lightning_scar.core.skeleton import Path, Skeleton, pack, unpack
from lightning_scar.storage.head import Mark
from lightning_scar.storage.index import Located
from lightning_scar.storage.reading import Damage, Reading, fill
from lightning_scar.storage.store import DeltaStore

_PREFIX = "skeleton-"


def skeleton_key(rank: int) -> str:
    """Return the name of a rank's skeleton in its deltas.

    Example::

        >>> skeleton_key(3)
        'skeleton-0003'

    """
    return f"{_PREFIX}{rank:04d}"


def is_skeleton(key: str) -> bool:
    """Return whether a key is that of a skeleton; those of other blocks end with their rows."""
    return key.startswith(_PREFIX) and not key.endswith("]")


def _rank(key: str) -> int:
    return int(key.removeprefix(_PREFIX))


def describe(block_map: BlockMap) -> str:
    """Convert a block map to JSON."""
    groups = [
        (g.name, g.shape, g.rows_per_block, [(s.name, str(s.dtype), s.stride, s.paths) for s in g.slots])
        for g in block_map.groups
    ]
    return json.dumps({"block_size": block_map.block_size, "groups": groups})


def parse(text: str) -> BlockMap:
    """Parse a map from :func:`describe`, without ``owner``, ``lazy`` and ``frozen``, which only live training needs."""

    def slot(name: str, dtype: str, stride: list[int] | None, paths: list[Any]) -> Slot:
        layout = tuple(stride) if stride is not None else None
        return Slot(name, getattr(torch, dtype.removeprefix("torch.")), layout, tuple(map(tuple, paths)))

    content = json.loads(text)
    groups = (
        Group(name, tuple(shape), tuple(slot(*s) for s in slots), size)
        for name, shape, size, slots in content["groups"]
    )
    return BlockMap(tuple(groups), content["block_size"])


def pack_skeleton(skeleton: Skeleton, description: str, sharded: Sequence[Path]) -> memoryview:
    """Return the bytes of a skeleton.

    Args:
        skeleton: The skeleton.
        description: The map of the blocks, from :func:`describe`.
        sharded: The places of dicts whose items are spread over the ranks.

    """
    return pack({"skeleton": skeleton, "map": description, "sharded": [list(path) for path in sharded]})


class Stored(NamedTuple):
    """A skeleton read back: the arguments of :func:`pack_skeleton`, and where it was stored."""

    skeleton: Skeleton
    map: BlockMap
    sharded: list[Path]
    at: Located

    @property
    def rank(self) -> int:
        """The rank whose skeleton it is; another rank may have merged the delta."""
        return _rank(self.at.block.key)


class Skeletons:
    """The skeletons in a store.

    Args:
        store: The store.
        limit: Versions after this full save are ignored.
        weights_only: As in ``torch.load``.

    """

    def __init__(self, store: DeltaStore, limit: Mark | None, weights_only: bool | None) -> None:
        self._store = store
        self._limit = limit
        self._weights_only = weights_only
        self.damages: list[tuple[Located, Damage]] = []

    def newest(self) -> Stored:
        """Return the newest skeleton of all ranks; of equally new ones that of the lowest rank.

        If optimizer state or a parameter has just appeared and some ranks have not saved their blocks of it yet, return
        the newest skeleton without it.

        Raises:
            IncompleteError: If no intact skeleton is left.

        """
        found = [at for key in sorted(filter(is_skeleton, self._store.index.keys())) for at in self._versions(key)]
        newest: Stored | None = None
        # Compare ranks by step, because each rank counts its own sequences.
        for at in sorted(found, key=lambda at: at.block.version.mark, reverse=True):
            if stored := self._read(at):
                if stored.sharded or self._is_served(stored.map):
                    return stored
                newest = newest or stored
        if newest is not None:
            return newest
        raise IncompleteError(f"{self._store.directory} holds no intact skeleton: every version of it is damaged")

    def of_rank(self, rank: int) -> Stored | None:
        """Return the newest intact skeleton of a rank."""
        return next(filter(None, map(self._read, self._versions(skeleton_key(rank)))), None)

    def of_all_starts(self) -> list[Stored]:
        """Return the newest intact skeleton of every rank in each start, the newest last."""
        found: dict[tuple[str, int], Stored] = {}
        for key in filter(is_skeleton, self._store.index.keys()):
            for at in self._versions(key):
                place = key, at.block.version.incarnation
                if place not in found and (stored := self._read(at)):
                    found[place] = stored
        return sorted(found.values(), key=lambda stored: stored.at.block.version.mark)

    def _is_served(self, block_map: BlockMap) -> bool:
        """Return whether every block has a version with the slots of the map."""
        return all(
            any(at.block.slots.keys() == slots for at in self._versions(group.key(i)))
            for group in block_map.groups
            for slots in [{slot.name for slot in group.slots}]
            for i in range(len(group))
        )

    def _versions(self, key: str) -> list[Located]:
        return [
            at for at in self._store.index.versions(key) if self._limit is None or at.block.version.mark <= self._limit
        ]

    def _read(self, at: Located) -> Stored | None:
        memory = at.block.new_memory()
        if found := fill([Reading(at, memory.copy)]):
            if found[0][0].located not in [located for located, _ in self.damages]:
                self.damages += [(reading.located, damage) for reading, damage in found]
            return None
        content = unpack(memory["bytes"], self._weights_only)
        if "small" in memory:
            content["skeleton"]["counters"] += unpack(memory["small"], self._weights_only)
        sharded = [tuple(path) for path in content["sharded"]]
        return Stored(content["skeleton"], parse(content["map"]), sharded, at)


def union(maps: Sequence[BlockMap]) -> BlockMap:
    """Combine the maps of ranks that know all groups, but only the first slot of some."""
    groups: dict[str, Group] = {}
    for group in (group for block_map in maps for group in block_map.groups):
        known = groups.setdefault(group.name, group)
        if len(group.slots) > len(known.slots):
            groups[group.name] = group
    return BlockMap(tuple(groups.values()), maps[0].block_size)


def put_shards_together(parts: Sequence[dict[str, Any]], sharded: Sequence[Path]) -> dict[str, Any]:
    """Complete a checkpoint with the items that other ranks have.

    Args:
        parts: The checkpoints of all ranks; the last one is completed in place, and later ones take precedence.
        sharded: The places of dicts whose items are spread over the ranks.

    Example::

        >>> put_shards_together([{"state": {1: "b"}}, {"state": {0: "a"}, "step": 2}], [("state",)])
        {'state': {0: 'a', 1: 'b'}, 'step': 2}

    """
    whole = parts[-1]
    for path in sharded:
        items: dict[Any, Any] = {}
        for part in parts:
            items |= _at(part, path)
        _at(whole, path[:-1])[path[-1]] = dict(sorted(items.items()))
    return whole


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value
