"""Copies of chosen blocks, on their way to the writer."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from lightning_scar.core.blocks import Group, rows
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
        if not self._slabs or self._used + nbytes > self._slabs[-1].numel():
            self._slabs.append(_slab(nbytes))
            self._used = 0

    def take(self, nbytes: int) -> Tensor:
        """A piece of the buffer: uint8, shape ``(nbytes,)``, aligned for any data type."""
        padded = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self.reserve(padded, pieces=0)
        start, self._used = self._used, self._used + padded
        return self._slabs[-1][start : start + nbytes]


def _slab(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


@dataclass
class StagedBlock:
    """A copy of one block.

    Attributes:
        group: The group it belongs to.
        number: Its number within the group.
        copies: For each slot of the group the bytes of its rows; uint8, one dimension.

    """

    group: Group
    number: int
    copies: list[Tensor]

    @property
    def key(self) -> str:
        """The block's name in a delta."""
        return self.group.key(self.number)

    @property
    def state_is_finite(self) -> bool:
        """Whether the optimizer state holds neither NaN nor Inf (the parameter's own distance tells of itself)."""
        slots = zip(self.group.slots[1:], self.copies[1:], strict=True)
        return all(is_finite(copy.view(slot.dtype)) for slot, copy in slots)

    def data(self, version: Version) -> BlockData:
        """What goes into the delta."""
        start, stop = self.group.span(self.number)
        shape = (stop - start, *self.group.row_shape)
        slots = {
            slot.name: payload(copy, slot.dtype, shape)
            for slot, copy in zip(self.group.slots, self.copies, strict=True)
        }
        return BlockData(self.key, version, slots)


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


def stage(buffer: StagingBuffer, group: Group, live: Sequence[Tensor], numbers: Iterable[int]) -> Iterator[StagedBlock]:
    """Copies blocks of one group, neighbours together.

    Args:
        buffer: Where to.
        group: The group.
        live: The group's tensors, one a slot.
        numbers: Which of its blocks, ascending.

    Yields:
        A copy of each block.

    """
    for first, last in _runs(numbers):
        start, stop = group.span(first)[0], group.span(last)[1]
        copies = [_copied(buffer, rows(tensor)[start:stop]) for tensor in live]
        for number in range(first, last + 1):
            low, high = (row - start for row in group.span(number))
            sizes = [slot.dtype.itemsize * group.row_numel for slot in group.slots]
            pieces = [copy[low * size : high * size] for copy, size in zip(copies, sizes, strict=True)]
            yield StagedBlock(group, number, pieces)


def _copied(buffer: StagingBuffer, values: Tensor) -> Tensor:
    copy = buffer.take(values.nbytes)
    copy.view(values.dtype).view(values.shape).copy_(values)
    return copy


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        yield members[0], members[-1]
