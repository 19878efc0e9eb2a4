"""A delta, the file of one save: what goes into it, and what is found in it.

The blocks of one group are stored together, in a *section*; so is its *refresh*.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import xxhash

from lightning_scar.storage.directory import Directory
from lightning_scar.storage.head import Head, Version

SUFFIX = ".safetensors"

#: First row, row after the last. ``(0, 0)`` for what is not divided into rows; its key is the name of its group.
Span = tuple[int, int]
WHOLE: Span = (0, 0)


class StorageError(RuntimeError):
    """What is on disk is not as it should be."""


class DamagedError(StorageError):
    """A delta, or an entry of one, does not match its checksum or ends too early."""


class NewerFormatError(StorageError):
    """A delta was written by a newer version of this library."""


def block_key(group: str, span: Span) -> str:
    """Return the name of a block.

    Example::

        >>> block_key("state_dict/weight", (0, 4)), block_key("skeleton-0000", WHOLE)
        ('state_dict/weight[0:4]', 'skeleton-0000')

    """
    return group if span == WHOLE else f"{group}[{span[0]}:{span[1]}]"


def _memory(nbytes: int) -> memoryview:
    # Unlike a bytearray, it is not filled with zeros first.
    return np.empty(nbytes, np.uint8).data


def checksum(data: bytes | memoryview) -> int:
    """Return the checksum of some bytes: XXH3 with 64 bits.

    Example::

        >>> hex(checksum(b"scar"))
        '0x2473c2ef04edd4aa'

    """
    return xxhash.xxh3_64_intdigest(data)


@dataclass(frozen=True)
class Column:
    """One slot of a section to be written.

    Attributes:
        dtype: The safetensors name of the data type.
        row_shape: The shape of one row.
        nbytes: Bytes of all rows.
        checksums: The checksum of each block.
        data: Yields the bytes in pieces, block after block; called when they are written.

    """

    dtype: str
    row_shape: tuple[int, ...]
    nbytes: int
    checksums: Sequence[int]
    data: Callable[[], Iterable[memoryview]]


@dataclass(frozen=True)
class Section:
    """Blocks of one group with the same slots, to be written.

    Attributes:
        group: The name of the group.
        spans: The rows of each block.
        versions: The version of each block.
        columns: The slots.

    """

    group: str
    spans: Sequence[Span]
    versions: Sequence[Version]
    columns: Mapping[str, Column]

    @property
    def keys(self) -> list[str]:
        """The names of the blocks."""
        return [block_key(self.group, span) for span in self.spans]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(column.nbytes for column in self.columns.values())


class Encoded(NamedTuple):
    """One slot of a group's refresh, to be written.

    Attributes:
        codec: How it is encoded, e.g. ``"linear4"``.
        codes: The bytes of the codes, block after block, in pieces.
        scales: The bytes of the scales (bfloat16), block after block, in pieces.

    """

    codec: str
    codes: Sequence[memoryview]
    scales: Sequence[memoryview]


@dataclass(frozen=True, eq=False)
class _Refreshed:
    """The blocks of a group that have a refresh.

    Attributes:
        group: The name of the group.
        rows: A row for each block, in the order of their codes: its span, and the base that it was made against
            (incarnation, sequence). An array, because a directory has hundreds of thousands, of which few are used.

    """

    group: str
    rows: np.ndarray[Any, Any]

    @cached_property
    def spans(self) -> list[Span]:
        """The rows of each block."""
        return [(first, last) for first, last in self.rows[:, :2].tolist()]

    @cached_property
    def bases(self) -> list[tuple[int, int]]:
        """The version of each block's base: incarnation, sequence."""
        return [(incarnation, sequence) for incarnation, sequence in self.rows[:, 2:].tolist()]


@dataclass(frozen=True, eq=False)
class Refresh(_Refreshed):
    """The refresh of one group, with its bytes.

    Attributes:
        slots: The slots.

    """

    slots: Mapping[str, Encoded]

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales."""
        return sum(len(piece) for slot in self.slots.values() for piece in (*slot.codes, *slot.scales))


class Entry(NamedTuple):
    """The place of some bytes in a file.

    Attributes:
        dtype: The safetensors name of their data type.
        start: Offset of the first byte in the file.
        stop: Offset after the last byte.
        checksum: XXH3 of the bytes.
        row_shape: The shape of one row, if they are rows.

    """

    dtype: str
    start: int
    stop: int
    checksum: int
    row_shape: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.stop - self.start


class StoredBlock:
    """One version of one block in a delta.

    Args:
        group: The name of its group.
        span: Its rows.
        version: Which version.
        slots: Returns its slots; called only if they are needed, because a directory has tens of thousands of blocks.

    """

    def __init__(self, group: str, span: Span, version: Version, slots: Callable[[], dict[str, Entry]]) -> None:
        self.group = group
        self.span = span
        self.key = block_key(group, span)
        self.version = version
        self._slots = slots

    @cached_property
    def slots(self) -> dict[str, Entry]:
        """The place of each of its slots."""
        return self._slots()

    def new_memory(self) -> dict[str, memoryview]:
        """Return memory to read the block into."""
        return {slot: _memory(entry.nbytes) for slot, entry in self.slots.items()}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the block's entries."""
        return sum(entry.nbytes for entry in self.slots.values())


class StoredSlot(NamedTuple):
    """One slot of a group's refresh in a file: how it is encoded, its codes and its scales."""

    codec: str
    codes: Entry
    scales: Entry


@dataclass(frozen=True, eq=False)
class StoredRefresh(_Refreshed):
    """The refresh of one group in a delta.

    Attributes:
        slots: The slots.

    """

    slots: dict[str, StoredSlot]

    @property
    def nbytes(self) -> int:
        """Bytes of all its codes and scales."""
        return sum(slot.codes.nbytes + slot.scales.nbytes for slot in self.slots.values())

    def new_memory(self) -> dict[str, tuple[memoryview, memoryview]]:
        """Return memory to read it into: codes and scales of each slot."""
        entries = ((slot, found.codes, found.scales) for slot, found in self.slots.items())
        return {slot: (_memory(codes.nbytes), _memory(scales.nbytes)) for slot, codes, scales in entries}


@dataclass(frozen=True)
class Delta:
    """A delta file whose header is intact.

    Attributes:
        directory: Its directory; in another one the same name may be another file.
        name: Its name there.
        nbytes: Its size.
        head: Its metadata.
        blocks: Its exact blocks.
        refreshes: Its low-precision refreshes.

    """

    directory: Directory
    name: str
    nbytes: int
    head: Head
    blocks: tuple[StoredBlock, ...]
    refreshes: tuple[StoredRefresh, ...] = field(default=())

    @property
    def file(self) -> str:
        """Its full path."""
        return self.directory.file(self.name)

    @property
    def folder(self) -> str:
        """Its rank's folder, relative to the directory."""
        return self.name.partition("/")[0]

    @cached_property
    def oldest_incarnation(self) -> int:
        """The incarnation of its oldest block."""
        return min((block.version.incarnation for block in self.blocks), default=self.head.incarnation)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of its blocks, without header and refresh."""
        return sum(block.nbytes for block in self.blocks)

    @cached_property
    def refresh_bytes(self) -> int:
        """Bytes of its refresh."""
        return sum(refresh.nbytes for refresh in self.refreshes)
