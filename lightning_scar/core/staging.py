"""Copies of chosen blocks, on their way to the writer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_scar.core.blocks import Group, Slot
from lightning_scar.core.distance import is_finite
from lightning_scar.core.memory import memory
from lightning_scar.storage.delta import BlockData, Payload, Version, checksum

_ALIGNMENT = 16

#: What safetensors calls a data type. The others are written as bytes; the skeleton knows their true type.
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


class StagingBuffer:
    """Host memory that one save is copied to, reused by later saves.

    Example::

        >>> buffer = StagingBuffer()
        >>> buffer.take(100).shape
        torch.Size([100])

    """

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []
        self._used = 0

    def reset(self) -> None:
        """Makes all memory free again; what was taken before must not be used any more."""
        if len(self._slabs) > 1:
            self._slabs = [_slab(sum(slab.numel() for slab in self._slabs))]
        self._used = 0

    def reserve(self, nbytes: int, pieces: int = 1) -> None:
        """Makes sure that ``nbytes`` in so many pieces can be taken from one stretch of memory."""
        nbytes += pieces * _ALIGNMENT
        if self._slabs and self._used + nbytes <= self._slabs[-1].numel():
            return
        if self._slabs and not self._used:
            self._slabs.pop()
        # A little more than asked for: the next save may choose a few bytes more.
        self._slabs.append(_slab(nbytes + nbytes // 64))
        self._used = 0

    def take(self, nbytes: int) -> Tensor:
        """A piece of the buffer: uint8, shape ``(nbytes,)``, aligned for any data type."""
        padded = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self.reserve(padded, pieces=0)
        start, self._used = self._used, self._used + padded
        return self._slabs[-1][start : start + nbytes]


def _slab(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


class StagedBlock(NamedTuple):
    """A copy of one block: its key, its shape, and for each slot of its group the bytes."""

    key: str
    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    copies: list[Tensor]

    @property
    def state_is_finite(self) -> bool:
        """Whether the optimizer state holds neither NaN nor Inf; of the parameter itself its distance tells."""
        state = zip(self.slots[1:], self.copies[1:], strict=True)
        return all(is_finite(copy.view(slot.dtype)) for slot, copy in state)

    def data(self, version: Version) -> BlockData:
        """What goes into the delta."""
        slots = zip(self.slots, self.copies, strict=True)
        return BlockData(self.key, version, {slot.name: payload(copy, slot.dtype, self.shape) for slot, copy in slots})


@dataclass(frozen=True)
class StagedGroup:
    """Copies of some blocks of one group.

    Attributes:
        group: The group.
        numbers: Which of its blocks, ascending.
        copies: For each slot the bytes of these blocks, one after the other; uint8, one dimension.

    """

    group: Group
    numbers: list[int]
    copies: list[Tensor]

    def blocks(self) -> Iterator[StagedBlock]:
        """The copies block by block."""
        group, done = self.group, 0
        sizes = [slot.dtype.itemsize * group.row_numel for slot in group.slots]
        for number in self.numbers:
            start, stop = group.span(number)
            end = done + stop - start
            pieces = [copy[done * size : end * size] for copy, size in zip(self.copies, sizes, strict=True)]
            yield StagedBlock(group.key(number), (stop - start, *group.row_shape), group.slots, pieces)
            done = end


def payload(copy: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Payload:
    """Bytes on their way into a delta.

    Args:
        copy: The bytes; uint8, contiguous, on the CPU.
        dtype: What they really are.
        shape: The shape of what they really are.

    """
    data = memory(copy)
    name = _NAMES.get(dtype)
    return Payload(name or "U8", shape if name else (len(data),), len(data), checksum(data), lambda: data)


def stage(buffer: StagingBuffer, group: Group, live: Sequence[Tensor], numbers: list[int]) -> StagedGroup:
    """Copies blocks of one group.

    Args:
        buffer: Where to.
        group: The group.
        live: The group's tensors, one a slot, as rows.
        numbers: Which of its blocks, ascending.

    """
    n_rows = sum(stop - start for start, stop in map(group.span, numbers))
    copies = []
    for slot, tensor in zip(group.slots, live, strict=True):
        copy = buffer.take(n_rows * group.row_numel * slot.dtype.itemsize)
        gather(tensor, group, numbers, copy.view(slot.dtype).view(n_rows, *group.row_shape))
        copies.append(copy)
    return StagedGroup(group, numbers, copies)


def gather(tensor: Tensor, group: Group, numbers: list[int], into: Tensor) -> None:
    """Copies the rows of some blocks, one block after the other.

    Args:
        tensor: All rows.
        group: The group it belongs to.
        numbers: Which of its blocks, ascending.
        into: Where to; as many rows as the blocks have.

    """
    whole, done = _whole(tensor, group, numbers), 0
    if len(whole) > 1:
        # All blocks of equal size in one operation: for thousands of blocks the calls would cost more than the copy.
        done = len(whole) * group.rows_per_block
        index = torch.tensor(whole, device=tensor.device)
        torch.index_select(_by_block(tensor, group), 0, index, out=into[:done].view(len(whole), -1))
    for start, stop in map(group.span, numbers[len(whole) if done else 0 :]):
        into[done : done + stop - start].copy_(tensor[start:stop])
        done += stop - start


def scatter(tensor: Tensor, group: Group, numbers: list[int], values: Tensor) -> None:
    """The inverse of :func:`gather`: writes ``values`` to the rows of some blocks of ``tensor``."""
    whole, done = _whole(tensor, group, numbers), 0
    if len(whole) > 1:
        done = len(whole) * group.rows_per_block
        index = torch.tensor(whole, device=tensor.device)
        _by_block(tensor, group).index_copy_(0, index, values[:done].view(len(whole), -1))
    for start, stop in map(group.span, numbers[len(whole) if done else 0 :]):
        tensor[start:stop].copy_(values[done : done + stop - start])
        done += stop - start


def _whole(tensor: Tensor, group: Group, numbers: list[int]) -> list[int]:
    """The blocks that can be addressed as rows of one matrix: not the last one, which may be shorter."""
    indexable = tensor.is_contiguous() and tensor.device.type == "cpu" and tensor.dtype.itemsize > 1
    return [number for number in numbers if number < len(group) - 1] if indexable else []


def _by_block(tensor: Tensor, group: Group) -> Tensor:
    rows_in_whole = (len(group) - 1) * group.rows_per_block
    return tensor[:rows_in_whole].view(len(group) - 1, -1)
