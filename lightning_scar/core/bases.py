"""What the owner remembers of the blocks that it saved: their bases, and when that was."""

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
#: Values of a frozen tensor that are compared at every save.
_SAMPLE = 1024


class Seen(NamedTuple):
    """What a frozen tensor is recognised by without a copy of it: who it is, its version counter, and some values."""

    identity: tuple[Any, ...]
    counter: int
    sample: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> "Seen":
        """What there is to see of a tensor."""
        return cls(identity(tensor), tensor._version, _sample(tensor))

    def differs(self, tensor: Tensor) -> Tensor:
        """Whether a tensor is another one, or has changed: a bool of no dimension, on the tensor's device."""
        if (self.identity, self.counter) != (identity(tensor), tensor._version):
            return torch.ones((), dtype=torch.bool, device=tensor.device)
        return (_sample(tensor).view(torch.uint8) != self.sample.view(torch.uint8)).any()


def _sample(tensor: Tensor) -> Tensor:
    # Writes through `.data` leave the counter as it was. Those that touch all of a tensor, as a moving average does,
    # are seen all the same.
    stride = max(1, tensor.numel() // _SAMPLE)
    where = torch.arange(0, tensor.numel(), stride, device=tensor.device)
    return torch.take(tensor, where) if stride > 1 else tensor.flatten().clone()


@dataclass
class Base:
    """The last exact values of one group's first slot.

    Attributes:
        values: One copy, laid out like the live tensor; ``None`` for a frozen tensor, which needs none.
        seen: What a frozen tensor is recognised by.
        has_moved: Whether a tensor that was taken for frozen has changed all the same; it may do so again.

    """

    values: Tensor | None = None
    seen: Seen | None = None
    has_moved: bool = False


class Bases:
    """The base of every block that this rank owns: values, version, and whether it has to be written again.

    The values are one copy of the parameters that move; of optimizer state there is none. Numbers are those of the
    blocks in the map.

    Attributes:
        map: The blocks.
        steps: The step of each block's base, int64; :data:`NEVER` for one that was never saved.
        incarnations: The start of the training that wrote it, int64.
        sequences: The save that wrote it, int64.
        due: Blocks whose base here is not the one on disk: their last write failed, or was called off. They have no
            refresh, and are written again whatever their distance.

    """

    def __init__(self) -> None:
        self.map = BlockMap((), 0)
        self._begin(0)
        self._bases: dict[str, Base] = {}

    def _begin(self, blocks: int) -> None:
        self.steps = torch.full((blocks,), NEVER)
        self.incarnations = torch.full((blocks,), NEVER)
        self.sequences = torch.full((blocks,), NEVER)
        self.due = torch.zeros(blocks, dtype=torch.bool)

    def adopt(self, block_map: BlockMap, values: Mapping[str, Tensor], versions: Mapping[str, Version]) -> None:
        """Begins with what a running checkpoint held.

        Args:
            block_map: Its map.
            values: For each group the bases of its first slot; kept, not copied.
            versions: For each block, by key, the version of its base; none for a block that has none.

        """
        self.map = block_map
        self._begin(len(block_map))
        self._bases = {name: Base(tensor) for name, tensor in values.items()}
        for key, number in block_map.numbers.items():
            if (version := versions.get(key)) is not None:
                self.incarnations[number], self.sequences[number], self.steps[number] = version

    def fit(self, block_map: BlockMap, live: Sequence[Sequence[Tensor]]) -> None:
        """Follows a change of the state: what is known of unchanged groups stays, the rest counts as never saved.

        Args:
            block_map: The new map.
            live: The tensors of each of its groups, one a slot.

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
        """The numbers of the blocks of group ``g``."""
        return slice(*self.map.offsets[g : g + 2])

    def base(self, group: Group) -> Base:
        """What is known of a group's base."""
        return self._bases[group.name]

    def values(self, group: Group) -> Tensor | None:
        """The last exact values of a group, as rows; those of blocks that were never saved mean nothing."""
        values = self._bases[group.name].values
        return None if values is None else rows(values)

    def is_known(self) -> Tensor:
        """Which blocks have here the base that they have on disk, bool."""
        return (self.steps != NEVER) & ~self.due

    def thaw(self, g: int, live: Tensor) -> None:
        """A frozen group has changed: from now on its bases are kept, once all its blocks are written anew."""
        self._bases[self.map.groups[g].name] = Base(torch.empty_like(live), has_moved=True)
        self.due[self.blocks(g)] = True

    def freeze(self, g: int, live: Tensor) -> None:
        """All of a frozen group is on disk as it is now: no copy is needed to notice if it ever changes."""
        if not self.base(self.map.groups[g]).has_moved:
            self._bases[self.map.groups[g].name] = Base(None, Seen.of(live))

    def record(self, blocks: Tensor, version: Version) -> None:
        """Notes a save of some blocks, by number."""
        self.incarnations[blocks], self.sequences[blocks], self.steps[blocks] = version
        self.due[blocks] = False

    def written_by(self, version: Version) -> Iterator[str]:
        """The names of the blocks whose base is of that save."""
        same = (self.incarnations == version.incarnation) & (self.sequences == version.sequence)
        for block in same.nonzero().flatten().tolist():
            g, number = self.map.locate(block)
            yield self.map.groups[g].key(number)

    def lose(self, keys: Collection[str], is_stored: Callable[[str, set[str]], bool]) -> None:
        """What was recorded of some blocks is not on disk.

        Args:
            keys: Their names.
            is_stored: Tells of a name and of slots whether some version of the block is, with these.

        """
        for key in keys:
            if (block := self.map.numbers.get(key)) is not None:
                group = self.map.groups[self.map.locate(block)[0]]
                lose = self.fail if is_stored(key, {slot.name for slot in group.slots}) else self.forget
                lose(torch.tensor([block]))

    def fail(self, blocks: Tensor) -> None:
        """What was recorded of some blocks is not on disk."""
        self.due[blocks] = True

    def forget(self, blocks: Tensor) -> None:
        """Makes blocks count as never saved."""
        self.steps[blocks] = NEVER


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cuts ascending numbers into runs without gaps: first number, and the one behind the last.

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
        # It may be another rank's part of the same tensor: what is not known to be unchanged is looked at once.
        return Base(None, base.seen)
    values = rows(base.values)[row : row + group.rows]
    is_all = values.untyped_storage().nbytes() == values.nbytes
    if is_all and values.stride() == live.stride() and values.device == live.device:
        return Base(values, has_moved=base.has_moved)
    # In the layout of the live tensor, which makes scoring one straight read, in memory of its own.
    return Base(torch.empty_like(live).copy_(values), has_moved=base.has_moved)


def _is_part(group: Group, of: Group) -> bool:
    """Whether every block of a group is one of another group, too."""
    end, whole_end = group.first_row + group.rows, of.first_row + of.rows
    # A block shorter than the others is the last one of its parameter.
    same_blocks = end == whole_end or (end < whole_end and end % group.rows_per_block == 0)
    return group.first_row >= of.first_row and same_blocks and _likeness(group) == _likeness(of)


def _likeness(group: Group) -> tuple[object, ...]:
    slots = tuple((slot.name, slot.dtype) for slot in group.slots)
    return len(group.shape), group.row_shape, group.rows_per_block, slots
