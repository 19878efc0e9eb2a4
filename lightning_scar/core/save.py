"""One save, on its way from live tensors to a file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_scar.core.bases import runs
from lightning_scar.core.blocks import Group, Slot
from lightning_scar.core.codec import Codec
from lightning_scar.core.devices import CPUQueue, HostBuffer, Queue
from lightning_scar.core.memory import memory
from lightning_scar.core.rework import Motion
from lightning_scar.core.skeleton import Path
from lightning_scar.storage.delta import Column, Encoded, Refresh, Section, checksum
from lightning_scar.storage.head import Version

#: The names of data types in safetensors. Other types are written as bytes; the skeleton holds their true type.
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


@dataclass
class Codes:
    """One slot of a group in low precision.

    Attributes:
        codec: The codec.
        pieces: Codes and scales in host memory, as matrices with a block per row, by the number of the block size.

    """

    codec: Codec
    pieces: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The bytes of the codes and scales of all blocks."""
        return sum(codes.nbytes + scales.nbytes for codes, scales in self.pieces.values())

    def encoded(self, blocks: Sequence[tuple[int, int]]) -> Encoded:
        """Return some runs of blocks (first number, last number + 1) in the form of a delta."""
        found: tuple[list[memoryview], list[memoryview]] = [], []
        start = 0
        for _, piece in sorted(self.pieces.items()):
            end = start + piece[0].shape[0]
            spans = [(max(first, start) - start, min(stop, end) - start) for first, stop in blocks]
            for own, matrix in zip(found, piece, strict=True):
                data, size = memory(matrix), matrix[0].nbytes
                own += [data[first * size : stop * size] for first, stop in spans if first < stop]
            start = end
        return Encoded(self.codec.name, *found)


@dataclass
class Part:
    """One group in a save.

    Attributes:
        group: The group.
        live: Its live tensors as rows, one per slot.
        exact: The numbers of the blocks to write exactly, ascending.
        rows: The bytes of these blocks, one after the other, for each slot; uint8, host memory.
        refreshed: The numbers of the blocks to write in low precision, ascending.
        codes: The codes of all blocks, by slot.
        table: A row for each of these: its span in the parameter, and the version of its base (incarnation, sequence);
            int64, shape ``(n, 4)``.

    """

    group: Group
    live: list[Tensor]
    exact: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    refreshed: list[int] = field(default_factory=list)
    codes: dict[str, Codes] = field(default_factory=dict)
    table: Tensor = field(default_factory=lambda: torch.empty(0, 4, dtype=torch.int64, device="cpu"))

    @property
    def code_bytes(self) -> int:
        """The bytes of the codes and scales of all blocks."""
        return sum(codes.nbytes for codes in self.codes.values())

    def section(self, version: Version, left_out: set[int]) -> Section | None:
        """Return the exact blocks in the form of a delta, ``None`` if there are none.

        Args:
            version: Their version.
            left_out: The numbers of blocks to leave out after all.

        """
        numbers = [number for number in self.exact if number not in left_out]
        if not numbers:
            return None
        spans = [self.group.span(number) for number in numbers]
        columns = {slot.name: self._column(slot, rows, numbers) for slot, rows in self._slots()}
        return Section(self.group.name, [self._absolute(span) for span in spans], [version] * len(spans), columns)

    def blocks(self) -> Iterator[tuple[int, dict[Slot, Tensor]]]:
        """Yield the number of each exact block, and its bytes in each slot."""
        for number, start, stop in self._rows(self.exact):
            yield (
                number,
                {slot: rows[start * size : stop * size] for slot, rows in self._slots() for size in [self._size(slot)]},
            )

    def refresh(self) -> Refresh | None:
        """Return the refresh in the form of a delta, ``None`` if there is none."""
        if not self.refreshed:
            return None
        blocks = list(runs(self.refreshed))
        slots = {name: codes.encoded(blocks) for name, codes in self.codes.items()}
        return Refresh(self.group.name, self.table.numpy(), slots)

    def _slots(self) -> Iterator[tuple[Slot, Tensor]]:
        return zip(self.group.slots, self.rows, strict=True)

    def _size(self, slot: Slot) -> int:
        return slot.dtype.itemsize * self.group.row_numel

    def _rows(self, numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Yield the numbers of exact blocks, and the start and end of their rows in the copy."""
        wanted, done = set(numbers), 0
        for number in self.exact:
            start, stop = self.group.span(number)
            if number in wanted:
                yield number, done, done + stop - start
            done += stop - start

    def _column(self, slot: Slot, rows: Tensor, numbers: Sequence[int]) -> Column:
        data, size = memory(rows), self._size(slot)
        pieces = [data[start * size : stop * size] for _, start, stop in self._rows(numbers)]
        name = _NAMES.get(slot.dtype)
        row_shape = self.group.row_shape if name else (size,)
        together = [data] if len(numbers) == len(self.exact) else pieces
        return Column(name or "U8", row_shape, sum(map(len, pieces)), [checksum(p) for p in pieces], lambda: together)

    def _absolute(self, span: tuple[int, int]) -> tuple[int, int]:
        return self.group.first_row + span[0], self.group.first_row + span[1]


@dataclass
class Save:
    """One save.

    Attributes:
        version: Its version.
        full: Whether every block that may have changed is written exactly.
        skeleton: The pickled skeleton.
        parts: The groups.
        small: Tensors of the skeleton that were on an accelerator when it was pickled, with their places; see
            :class:`~lightning_scar.core.skeleton.Skeleton`.
        buffer: Host memory for the copies.
        info: Small values to keep in the delta's header.
        queue: Runs the work alongside the training.
        chosen: The blocks to write exactly, by number, bool.
        never: The blocks that were never saved before, by number, bool.
        copied: The mark after the last read of live tensors.
        is_staged: Whether staging has started.
        stall: Seconds that the training thread stood still.
        non_finite: How many blocks were left out because they hold NaN or Inf and have a good version.
        squared_rest: Squared distance between the live state and the running checkpoint, with this save in it.
        squared_bases: The same without the refresh.
        oldest_age: Age of the oldest block that has changed and that this save does not write exactly.
        motion: How fast the blocks move, and how much of that a crash would undo.

    """

    version: Version
    full: bool
    skeleton: memoryview
    parts: list[Part]
    small: list[tuple[list[Path], Tensor]] = field(default_factory=list)
    info: Mapping[str, Any] = field(default_factory=dict)
    buffer: HostBuffer = field(default_factory=HostBuffer)
    queue: Queue = field(default_factory=CPUQueue)
    chosen: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool, device="cpu"))
    never: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool, device="cpu"))
    copied: Any = None
    is_staged: bool = False
    stall: float = 0.0
    non_finite: int = 0
    squared_rest: float = 0.0
    squared_bases: float = 0.0
    oldest_age: int = 0
    motion: Motion = field(default_factory=Motion)

    @property
    def distance(self) -> float:
        """The L2 distance between the live state and the running checkpoint, with this save in it."""
        return float(self.squared_rest**0.5)
