"""Blocks, contiguous rows of one parameter with the same rows of its optimizer state, and the block map.

The map is a pure function of names, shapes and the block size. A block's rows depend only on its own parameter, so they
stay the same when optimizer state appears late or other tensors come and go.
"""

from bisect import bisect_right
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_scar.core.skeleton import Leaf, Path, identity, wrapping
from lightning_scar.core.zero import is_sharded, shard_owner

_BLOCKS_AIMED_AT = 4096
_SMALLEST, _LARGEST = 4 * 1024, 4 * 1024 * 1024


@dataclass(frozen=True)
class Slot:
    """One tensor of a group: the parameter itself, or optimizer state of its shape.

    Attributes:
        name: ``"param"`` or the optimizer's name for it, e.g. ``"exp_avg"``.
        dtype: The tensor's data type.
        stride: Strides of a dense layout that is not row-major (channels-last, transposed), else ``None``.
        paths: The tensor's places in the checkpoint; several for tied weights.

    """

    name: str
    dtype: torch.dtype
    stride: tuple[int, ...] | None
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class Group:
    """A parameter (or any other large tensor) and the optimizer state of its shape, cut into blocks of whole rows.

    Attributes:
        name: The place in the checkpoint, e.g. ``"state_dict/layer.weight"``.
        shape: The shape of every slot.
        slots: The tensors; distances are measured on the first one.
        rows_per_block: Rows of the first dimension in every block except the last.
        lazy: Whether it should change only in optimizer steps: parameters and optimizer state.
        frozen: Whether it should not change at all: a parameter that no optimizer trains.
        first_row: Where its rows begin in the parameter; may be above 0 in one rank's share.
        owner: The only rank that has the right values; ``None`` if all ranks have the same.

    """

    name: str
    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    rows_per_block: int
    lazy: bool = False
    frozen: bool = False
    first_row: int = 0
    owner: int | None = None

    @property
    def rows(self) -> int:
        """The size of the first dimension; 1 for a 0-d tensor."""
        return self.shape[0] if self.shape else 1

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return self.shape[1:]

    @cached_property
    def row_numel(self) -> int:
        """The number of elements in a row."""
        return int(torch.Size(self.row_shape).numel())

    @cached_property
    def row_nbytes(self) -> int:
        """The bytes of a row over all slots."""
        return self.row_numel * sum(slot.dtype.itemsize for slot in self.slots)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return -(-self.rows // self.rows_per_block)

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """The number of blocks of each size, and the elements of each; the last block may be shorter."""
        rows = min(self.rows_per_block, self.rows)
        whole, rest = divmod(self.rows, rows)
        of_whole = whole, rows * self.row_numel
        return (of_whole, (1, rest * self.row_numel)) if rest else (of_whole,)

    def span(self, i: int) -> tuple[int, int]:
        """Return the first row of block ``i`` in the group, and its last row + 1."""
        start = i * self.rows_per_block
        return start, min(start + self.rows_per_block, self.rows)

    def key(self, i: int) -> str:
        """Return the block's name in a delta."""
        start, stop = self.span(i)
        return f"{self.name}[{self.first_row + start}:{self.first_row + stop}]"

    def of(self, tensor: Tensor) -> Tensor:
        """Return the group's rows of a parameter, or of optimizer state of its shape."""
        found = rows(tensor)
        return found if len(found) == self.rows else found[self.first_row : self.first_row + self.rows]


@dataclass(frozen=True)
class BlockMap:
    """The division of a training state into blocks.

    Attributes:
        groups: The parameters with their state, and all other large tensors.
        block_size: Bytes of a parameter's rows in a block (rows are never split).

    """

    groups: tuple[Group, ...]
    block_size: int

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """The number of each group's first block, and the number of all blocks at the end."""
        sums = [0]
        for group in self.groups:
            sums.append(sums[-1] + len(group))
        return tuple(sums)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return self.offsets[-1]

    @cached_property
    def nbytes(self) -> Tensor:
        """The bytes of every block over all slots; int64, 1-d."""
        sizes = []
        for group in self.groups:
            own = torch.full((len(group),), group.rows_per_block * group.row_nbytes, device="cpu")
            start, stop = group.span(len(group) - 1)
            own[-1] = (stop - start) * group.row_nbytes
            sizes.append(own)
        return torch.cat(sizes) if sizes else torch.zeros(0, dtype=torch.int64, device="cpu")

    @cached_property
    def spans(self) -> Tensor:
        """The first row of each block in its parameter, and its last row + 1; int64, shape ``(blocks, 2)``."""
        found = [torch.zeros(0, 2, dtype=torch.int64, device="cpu")]
        for group in self.groups:
            start = torch.arange(0, group.rows, group.rows_per_block, device="cpu")
            stop = (start + group.rows_per_block).clamp_(max=group.rows)
            found.append(torch.stack([start, stop], 1) + group.first_row)
        return torch.cat(found)

    def by_group(self, blocks: Tensor) -> list[list[int]]:
        """Return for each group the numbers within it of some blocks, given by ascending number."""
        cuts = torch.searchsorted(blocks, torch.tensor(self.offsets, device="cpu")).tolist()
        numbers = blocks.tolist()
        return [
            [number - offset for number in numbers[start:stop]]
            for (start, stop), offset in zip(pairwise(cuts), self.offsets, strict=False)
        ]

    @cached_property
    def state_bytes(self) -> int:
        """The bytes of all blocks."""
        return int(self.nbytes.sum())

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each block, by key."""
        return {g.key(i): start + i for g, start in zip(self.groups, self.offsets, strict=False) for i in range(len(g))}

    def locate(self, block: int) -> tuple[int, int]:
        """Return the group of a block, and its number within the group."""
        group = bisect_right(self.offsets, block) - 1
        return group, block - self.offsets[group]


def rows(tensor: Tensor) -> Tensor:
    """Return the tensor, or a 0-d tensor as one row."""
    return tensor if tensor.dim() else tensor.unsqueeze(0)


def build_map(
    leaves: Sequence[Leaf],
    optimizers: Mapping[Path, tuple[Optimizer, Mapping[str, Any]]],
    parameters: Iterable[Tensor],
    block_size: int | None,
) -> BlockMap:
    """Divide a checkpoint's large tensors into blocks.

    Args:
        leaves: The tensors with their places.
        optimizers: The live optimizer and its state in the checkpoint, by the place of that state.
        parameters: Tensors that change only in optimizer steps.
        block_size: Bytes of a parameter's rows in a block; ``None`` aims at 4096 blocks of 4 KiB to 4 MiB.

    Returns:
        The map, with groups in the order of the leaves.

    """
    moments = {path: pair for prefix, (opt, state) in optimizers.items() for path, pair in _moments(prefix, opt, state)}
    owners = _owners(optimizer for optimizer, _ in optimizers.values())
    trained = set(_trained(optimizer for optimizer, _ in optimizers.values()))
    lazy = {identity(tensor) for tensor in parameters} | {parameter for parameter, _ in moments.values()} | set(owners)
    # Without an optimizer we do not know what is frozen.
    frozen = lazy - trained if trained else set()
    names: dict[tuple[Any, ...], str] = {}
    drafts: dict[str, _Draft] = {}
    unpaired: list[Leaf] = []
    for leaf in leaves:
        if leaf.path in moments:
            unpaired.append(leaf)
            continue
        who = identity(leaf.tensor)
        if who not in names:
            names[who] = _unused("/".join(map(str, leaf.path)), drafts)
            # What does not change in optimizer steps may differ between ranks: rank 0's values are saved.
            owner = owners.get(who, None if who in lazy else 0)
            drafts[names[who]] = _Draft({"param": []}, who in lazy, owner, who in frozen)
        drafts[names[who]].slots["param"].append(leaf)
    size = block_size or _automatic_size(drafts.values())
    for leaf in unpaired:
        who, word = moments[leaf.path]
        parameter = names.get(who)
        if parameter is not None and drafts[parameter].shape == leaf.tensor.shape:
            # A parameter of two optimizers: number the second one's slots.
            taken = drafts[parameter].slots
            taken[word if word not in taken else f"{word}#{len(taken)}"] = [leaf]
        else:
            # Named after the parameter, because indices in an optimizer change when parameters are added.
            name = _unused("/".join([*map(str, leaf.path[:-2]), parameter or str(leaf.path[-2]), word]), drafts)
            drafts[name] = _Draft({"param": [leaf]}, True, owners.get(who))
    return BlockMap(tuple(draft.group(name, size) for name, draft in drafts.items()), size)


@dataclass
class _Draft:
    """A group whose slots are being collected."""

    slots: dict[str, list[Leaf]]
    lazy: bool
    owner: int | None
    frozen: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.slots["param"][0].tensor.shape

    def group(self, name: str, block_size: int) -> Group:
        slots = tuple(
            Slot(slot, leaves[0].tensor.dtype, _dense_stride(leaves[0].tensor), tuple(leaf.path for leaf in leaves))
            for slot, leaves in self.slots.items()
        )
        row_bytes = torch.Size(self.shape[1:]).numel() * slots[0].dtype.itemsize
        rows_per_block = max(1, block_size // row_bytes)
        return Group(name, tuple(self.shape), slots, rows_per_block, self.lazy, self.frozen, owner=self.owner)


def _trained(optimizers: Iterable[Optimizer]) -> Iterator[tuple[Any, ...]]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from (identity(tensor) for tensor in group["params"] if tensor.requires_grad)


def _owners(optimizers: Iterable[Optimizer]) -> dict[tuple[Any, ...], int]:
    """Return the owner of each parameter whose optimizer state is sharded."""
    sharded = (optimizer for optimizer in optimizers if is_sharded(optimizer))
    return {identity(tensor): rank for optimizer in sharded for tensor, rank in shard_owner(optimizer).items()}


def _unused(name: str, taken: Container[str]) -> str:
    # Different places may have the same text: 1 and "1", or "a/b" and the "b" in "a".
    while name in taken:
        name += "'"
    return name


def _dense_stride(tensor: Tensor) -> tuple[int, ...] | None:
    if tensor.is_contiguous() or not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return None
    return tuple(tensor.stride())


def _automatic_size(drafts: Collection[_Draft]) -> int:
    # All ranks need the same size, and other tensors may exist on one rank only: count parameters if there are any.
    counting = [draft for draft in drafts if draft.lazy] or drafts
    total = sum(draft.slots["param"][0].tensor.nbytes for draft in counting)
    return min(max(total // _BLOCKS_AIMED_AT, _SMALLEST), _LARGEST)


def _moments(prefix: Path, optimizer: Optimizer, state: Mapping[str, Any]) -> Iterator[tuple[Path, tuple[Any, str]]]:
    live = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ids = [i for group in state.get("param_groups", ()) for i in group["params"]]
    if len(ids) != len(live):
        return  # Not in torch's format: its tensors become separate groups.
    for i, parameter in zip(ids, live, strict=True):
        for path in _tensor_paths(state["state"].get(i, {})):
            yield (*prefix, "state", i, *path), (identity(parameter), ".".join(map(str, path)))


def _tensor_paths(value: Any) -> Iterator[Path]:
    if isinstance(value, Tensor):
        wrapper = wrapping(value)
        yield () if wrapper is None else (wrapper.name,)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        for path in _tensor_paths(item):
            yield (key, *path)
