"""Copying blocks from one delta into another."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from lightning_scar.storage.delta import WHOLE, Column, DamagedError, Delta, Entry, Section, StoredBlock
from lightning_scar.storage.delta_file import read_entries
from lightning_scar.storage.source import Source

#: Bytes read before they are written.
_AT_ONCE = 1 << 21


class Copy(NamedTuple):
    """A block to be copied.

    Attributes:
        delta: Where it is.
        block: Which block.
        source: That delta's open file, which stays readable even if it is deleted meanwhile.

    """

    delta: Delta
    block: StoredBlock
    source: Source


class DamagedCopyError(DamagedError):
    """A block to be copied is damaged in its source.

    Attributes:
        copy: The block.

    """

    def __init__(self, copy: Copy, error: DamagedError) -> None:
        super().__init__(f"{copy.delta.file}: {error}")
        self.copy = copy


def as_sections(copies: Iterable[Copy]) -> list[Section]:
    """Return the sections of a new delta; their bytes are read and verified when they are written.

    A damaged block then raises :class:`DamagedCopyError`.
    """
    alike: dict[Any, list[Copy]] = {}
    for number, copy in enumerate(copies):
        alike.setdefault(_kind(copy.block, number), []).append(copy)
    return [_section(found) for found in alike.values()]


def _kind(block: StoredBlock, number: int) -> Any:
    """Return what blocks of one section have in common."""
    if block.span == WHOLE:
        return number
    rows = block.span[1] - block.span[0]
    slots = ((slot, entry.dtype, entry.row_shape, entry.nbytes // rows) for slot, entry in block.slots.items())
    return block.group, *slots


def _section(copies: Sequence[Copy]) -> Section:
    first = copies[0].block
    columns = {}
    for slot, (dtype, *_, row_shape) in first.slots.items():
        places = [(copy, copy.block.slots[slot]) for copy in copies]
        nbytes, checksums = sum(entry.nbytes for _, entry in places), [entry.checksum for _, entry in places]
        columns[slot] = Column(dtype, row_shape, nbytes, checksums, partial(_read, places))
    return Section(first.group, [copy.block.span for copy in copies], [copy.block.version for copy in copies], columns)


def _read(places: Sequence[tuple[Copy, Entry]]) -> Iterator[memoryview]:
    for _, of_one_file in groupby(places, key=lambda place: place[0].delta.file):
        stretch: list[tuple[Copy, Entry]] = []
        for place in of_one_file:
            if stretch and sum(entry.nbytes for _, entry in stretch) + place[1].nbytes > _AT_ONCE:
                yield _read_together(stretch)
                stretch = []
            stretch.append(place)
        yield _read_together(stretch)


def _read_together(places: Sequence[tuple[Copy, Entry]]) -> memoryview:
    memory = rest = memoryview(bytearray(sum(entry.nbytes for _, entry in places)))
    into = []
    for _, entry in places:
        into.append((entry, rest[: entry.nbytes]))
        rest = rest[entry.nbytes :]
    try:
        read_entries(places[0][0].source, into)
    except DamagedError as error:
        if len(places) == 1:
            raise DamagedCopyError(places[0][0], error) from None
        # One by one, to find the damaged one.
        return memoryview(b"".join(_read_together([place]) for place in places))
    return memory
