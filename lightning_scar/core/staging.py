"""Copies of chosen blocks, on their way to the writer."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_scar.core.blocks import Group, Slot
from lightning_scar.core.distance import is_finite
from lightning_scar.core.memory import memory
from lightning_scar.core.threads import Run, batches, in_turn
from lightning_scar.storage.delta import BlockData, Payload, checksum
from lightning_scar.storage.head import Version

_ALIGNMENT = 64
#: Bytes that one thread copies before it takes the next piece.
_PIECE = 1 << 22

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


def stage(
    buffer: StagingBuffer, chosen: Iterable[tuple[Group, Sequence[Tensor], list[int]]], run: Run = in_turn
) -> list[StagedGroup]:
    """Copies blocks of several groups.

    Args:
        buffer: Where to.
        chosen: The groups, their tensors as rows, one a slot, and which of their blocks, ascending.
        run: Shares the work out.

    """
    staged: list[StagedGroup] = []

    def pieces() -> Iterator[_Piece]:
        # One by one, so that the first are being copied while the others are still being cut.
        for group, live, numbers in chosen:
            n_rows = sum(stop - start for start, stop in map(group.span, numbers))
            copies = [buffer.take(n_rows * group.row_numel * slot.dtype.itemsize) for slot in group.slots]
            staged.append(StagedGroup(group, numbers, copies))
            for slot, tensor, copy in zip(group.slots, live, copies, strict=True):
                into = copy.view(slot.dtype).view(n_rows, *group.row_shape)
                yield from _cut(_Piece(tensor, group, numbers, into))

    run(_gather_all, batches(pieces(), lambda piece: piece.into.nbytes, _PIECE))
    return staged


class _Piece(NamedTuple):
    """The arguments of :func:`gather`."""

    tensor: Tensor
    group: Group
    numbers: list[int]
    into: Tensor


def _gather_all(pieces: list[_Piece]) -> None:
    for piece in pieces:
        gather(*piece)


def _cut(piece: _Piece) -> Iterator[_Piece]:
    """Cuts a large copy, so that one thread does not get all of it."""
    tensor, group, numbers, into = piece
    if into.nbytes <= _PIECE:
        yield piece
        return
    step, rows = max(1, _PIECE * len(numbers) // into.nbytes), group.rows_per_block
    for i in range(0, len(numbers), step):
        yield _Piece(tensor, group, numbers[i : i + step], into[i * rows : (i + step) * rows])


def gather(tensor: Tensor, group: Group, numbers: list[int], into: Tensor) -> None:
    """Copies the rows of some blocks, one block after the other.

    Args:
        tensor: All rows.
        group: The group it belongs to.
        numbers: Which of its blocks, ascending.
        into: Where to, contiguous; as many rows as the blocks have.

    """
    whole, done = _whole(tensor, group, numbers), 0
    if len(whole) > 1:
        # All blocks of equal size in one operation: for thousands of blocks the calls would cost more than the copy.
        done = len(whole) * group.rows_per_block
        source, copy = _by_block(tensor, group), into[:done].view(len(whole), -1)
        # numpy's, since torch would wake its threads each time. "clip" has it write into `out` directly.
        np.take(_bytes(source), whole, axis=0, out=_bytes(copy), mode="clip")
    for start, stop in map(group.span, numbers[len(whole) if done else 0 :]):
        into[done : done + stop - start].copy_(tensor[start:stop])
        done += stop - start


def scatter(tensor: Tensor, group: Group, numbers: list[int], values: Tensor) -> None:
    """The inverse of :func:`gather`: writes ``values`` to the rows of some blocks of ``tensor``."""
    whole, done = _whole(tensor, group, numbers), 0
    if len(whole) > 1:
        done = len(whole) * group.rows_per_block
        _bytes(_by_block(tensor, group))[whole] = _bytes(values[:done].view(len(whole), -1))
    for start, stop in map(group.span, numbers[len(whole) if done else 0 :]):
        tensor[start:stop].copy_(values[done : done + stop - start])
        done += stop - start


def _whole(tensor: Tensor, group: Group, numbers: list[int]) -> list[int]:
    """The blocks that can be addressed as rows of one matrix: not the last one, which may be shorter."""
    indexable = tensor.is_contiguous() and tensor.device.type == "cpu"
    return [number for number in numbers if number < len(group) - 1] if indexable else []


def _by_block(tensor: Tensor, group: Group) -> Tensor:
    rows_in_whole = (len(group) - 1) * group.rows_per_block
    return tensor[:rows_in_whole].view(len(group) - 1, -1)


def _bytes(matrix: Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    return matrix.view(torch.uint8).numpy()
