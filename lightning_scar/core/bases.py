"""The bases of the blocks that this rank owns, and their versions."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_scar.core.blocks import BlockMap, Group, rows
from lightning_scar.core.skeleton import identity
from lightning_scar.storage.head import Version

NEVER = -1
#: How many values of a frozen tensor are compared at every save.
_SAMPLE = 1024


class Seen(NamedTuple):
    """A fingerprint that tells whether a frozen tensor has changed: identity, version counter and some values."""

    identity: tuple[Any, ...]
    counter: int
    sample: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> "Seen":
        """Take the fingerprint of a tensor."""
        return cls(identity(tensor), tensor._version, _sample(tensor))

    def differs(self, tensor: Tensor) -> Tensor:
        """Return whether a tensor is another one or has changed: a 0-d bool tensor on its device."""
        if (self.identity, self.counter) != (identity(tensor), tensor._version):
            return torch.ones((), dtype=torch.bool, device=tensor.device)
        return (_sample(tensor).view(torch.uint8) != self.sample.view(torch.uint8)).any()


def _sample(tensor: Tensor) -> Tensor:
    # Writes through `.data` do not change the version counter. The sample detects those that touch the whole tensor,
    # such as a moving average.
    stride = max(1, tensor.numel() // _SAMPLE)
    where = torch.arange(0, tensor.numel(), stride, device=tensor.device)
    return torch.take(tensor, where) if stride > 1 else tensor.flatten().clone()


@dataclass
class Base:
    """The last exact values of one group's first slot.

    Attributes:
        values: A copy in the layout of the live tensor; ``None`` for a frozen tensor.
        seen: The fingerprint of a frozen tensor.
        has_moved: Whether a frozen tensor has changed, and may do so again.

    """

    values: Tensor | None = None
    seen: Seen | None = None
    has_moved: bool = False


class Bases:
    """The base of every block that this rank owns: values, version, and whether it must be written again.

    Holds one copy of the parameters that train, and none of optimizer state. Blocks have the numbers of the map.

    Attributes:
        map: The blocks.
        steps: The step of each block's base, int64; :data:`NEVER` if it was never saved.
        incarnations: The start of the training that wrote it, int64.
        sequences: The save that wrote it, int64.
        due: Blocks whose base here is not the one on disk, because their last write failed or was cancelled. They get
            no refresh and are written again whatever their distance.

    """

    def __init__(self) -> None:
        self.map = BlockMap((), 0)
        self._begin(0)
        self._bases: dict[str, Base] = {}

    def _begin(self, blocks: int) -> None:
        self.steps = torch.full((blocks,), NEVER, device="cpu")
        self.incarnations = torch.full((blocks,), NEVER, device="cpu")
        self.sequences = torch.full((blocks,), NEVER, device="cpu")
        self.due = torch.zeros(blocks, dtype=torch.bool, device="cpu")

    def adopt(self, block_map: BlockMap, values: Mapping[str, Tensor], versions: Mapping[str, Version]) -> None:
        """Start from a restored running checkpoint.

        Args:
            block_map: Its map.
            values: The bases of each group's first slot, by group name; kept, not copied.
            versions: The version of each block's base, by key; blocks without a base are absent.

        """
        self.map = block_map
        self._begin(len(block_map))
        self._bases = {name: Base(tensor) for name, tensor in values.items()}
        for key, number in block_map.numbers.items():
            if (version := versions.get(key)) is not None:
                self.incarnations[number], self.sequences[number], self.steps[number] = version

    def fit(self, block_map: BlockMap, live: Sequence[Sequence[Tensor]]) -> None:
        """Adapt to a new map: unchanged groups keep their bases, the others count as never saved.

        Args:
            block_map: The new map.
            live: The tensors of each of its groups, one per slot.

        """
        if block_map is self.map:
            return
        old = self.map, self._bases, (self.steps, self.incarnations, self.sequences, self.due)
        known = {group.name: g for g, group in enumerate(self.map.groups)}
        self.map, self._bases = block_map, {}
        self._begin(len(block_map))
        for g, (group, tensors) in enumerate(zip(block_map.groups, live, strict=True)):
            at = known.get(group.name)
            if at is None or not _is_part(group, of=old[0].groups[at]):
                self._bases[group.name] = Base(None if group.frozen else torch.empty_like(tensors[0]))
                continue
            row = group.first_row - old[0].groups[at].first_row
            first = old[0].offsets[at] + row // group.rows_per_block
            for new, before in zip((self.steps, self.incarnations, self.sequences, self.due), old[2], strict=True):
                new[self.blocks(g)] = before[first : first + len(group)]
            self._bases[group.name] = _part(old[1].pop(group.name), tensors[0], row, group)

    def blocks(self, g: int) -> slice:
        """Return the numbers of the blocks of group ``g``."""
        return slice(*self.map.offsets[g : g + 2])

    def base(self, group: Group) -> Base:
        """Return the base of a group."""
        return self._bases[group.name]

    def values(self, group: Group) -> Tensor | None:
        """Return the last exact values of a group as rows; blocks that were never saved hold garbage."""
        values = self._bases[group.name].values
        return None if values is None else rows(values)

    def is_known(self) -> Tensor:
        """Return which blocks have the same base here as on disk, bool."""
        return (self.steps != NEVER) & ~self.due

    def thaw(self, g: int, live: Tensor) -> None:
        """Keep the bases of a frozen group that has changed, and write all its blocks again."""
        self._bases[self.map.groups[g].name] = Base(torch.empty_like(live), has_moved=True)
        self.due[self.blocks(g)] = True

    def freeze(self, g: int, live: Tensor) -> None:
        """Replace the copy of a frozen group, now on disk as it is, by a fingerprint."""
        if not self.base(self.map.groups[g]).has_moved:
            self._bases[self.map.groups[g].name] = Base(None, Seen.of(live))

    def record(self, blocks: Tensor, version: Version) -> None:
        """Record a save of some blocks, by number."""
        self.incarnations[blocks], self.sequences[blocks], self.steps[blocks] = version
        self.due[blocks] = False

    def written_by(self, version: Version) -> Iterator[str]:
        """Yield the keys of the blocks whose base was written by that save."""
        same = (self.incarnations == version.incarnation) & (self.sequences == version.sequence)
        for block in same.nonzero().flatten().tolist():
            g, number = self.map.locate(block)
            yield self.map.groups[g].key(number)

    def lose(self, keys: Collection[str], is_stored: Callable[[str, set[str]], bool]) -> None:
        """Handle blocks that were recorded but are not on disk.

        Args:
            keys: Their keys.
            is_stored: Tells whether some version of a block, by key, is on disk with the given slots.

        """
        for key in keys:
            if (block := self.map.numbers.get(key)) is not None:
                group = self.map.groups[self.map.locate(block)[0]]
                lose = self.fail if is_stored(key, {slot.name for slot in group.slots}) else self.forget
                lose(torch.tensor([block], device="cpu"))

    def fail(self, blocks: Tensor) -> None:
        """Mark blocks whose recorded base is not on disk."""
        self.due[blocks] = True

    def forget(self, blocks: Tensor) -> None:
        """Count blocks as never saved."""
        self.steps[blocks] = NEVER


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Split ascending numbers into runs without gaps: first number, and last number + 1.

    Example::

        >>> list(runs([0, 1, 2, 5, 7, 8]))
        [(0, 3), (5, 6), (7, 9)]

    """
    if not numbers:
        return
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), start=1) if b != a + 1), len(numbers)]
    for start, stop in pairwise(cuts):
        yield numbers[start], numbers[stop - 1] + 1


def _part(base: Base, live: Tensor, row: int, group: Group) -> Base:
    if base.values is None:
        # It may have been another rank's part of the tensor. Without a fingerprint it counts as changed.
        return Base(None, base.seen)
    values = rows(base.values)[row : row + group.rows]
    is_all = values.untyped_storage().nbytes() == values.nbytes
    if is_all and values.stride() == live.stride() and values.device == live.device:
        return Base(values, has_moved=base.has_moved)
    # The layout of the live tensor lets scoring read both in memory order.
    return Base(torch.empty_like(live).copy_(values), has_moved=base.has_moved)


def _is_part(group: Group, of: Group) -> bool:
    """Return whether every block of a group is also a block of another group."""
    end, whole_end = group.first_row + group.rows, of.first_row + of.rows
    # Only the last block of a parameter may be shorter than the others.
    same_blocks = end == whole_end or (end < whole_end and end % group.rows_per_block == 0)
    return group.first_row >= of.first_row and same_blocks and _likeness(group) == _likeness(of)


def _likeness(group: Group) -> tuple[object, ...]:
    slots = tuple((slot.name, slot.dtype) for slot in group.slots)
    return len(group.shape), group.row_shape, group.rows_per_block, slots
