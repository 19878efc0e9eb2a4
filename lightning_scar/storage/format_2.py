"""Format 2 of the delta: a section of rows for each group, and its refresh.

One entry for each slot (``param``, ``exp_avg``, ...) of a section holds the rows of its blocks, one block after the
other; the refresh of a group is one entry of codes and one of scales for each slot. Three tables of numbers at the
beginning of the data say which rows these are, in which versions, with a checksum for each block.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import orjson
import xxhash

from lightning_scar.storage.delta import (
    Column,
    Entry,
    Refresh,
    Section,
    Span,
    StoredBlock,
    StoredRefresh,
    StoredSlot,
    checksum,
)
from lightning_scar.storage.head import Version


def encode(
    sections: Sequence[Section], refreshes: Sequence[Refresh]
) -> tuple[dict[str, str], dict[str, Any], Iterator[bytes | memoryview]]:
    """Lays a delta out.

    Args:
        sections: The blocks to put in.
        refreshes: The refresh, at most one of each group.

    Returns:
        What the header says about them, the header's entries, and the data, piece by piece.

    """
    layout = _Layout()
    blocks = [(*span, *version) for s in sections for span, version in zip(s.spans, s.versions, strict=True)]
    sums = [number for section in sections for column in section.columns.values() for number in column.checksums]
    refreshed = [(*span, *base) for r in refreshes for span, base in zip(r.spans, r.bases, strict=True)]
    tables = [
        layout.table("blocks", "I64", np.array(blocks, dtype="<i8").reshape(-1, 5)),
        layout.table("checksums", "U64", np.array(sums, dtype="<u8")),
        layout.table("refreshed", "I64", np.array(refreshed, dtype="<i8").reshape(-1, 4)),
    ]
    # Names are given in the order of the header, whatever the order of the data.
    columns = [(layout.name(s.group, slot), column) for s in sections for slot, column in s.columns.items()]
    encoded = [(r.group, slot, found) for r in refreshes for slot, found in r.slots.items()]
    codes = [(layout.name("refresh", group, slot, "codes"), found.codes) for group, slot, found in encoded]
    scales = [(layout.name("refresh", group, slot, "scales"), found.scales) for group, slot, found in encoded]
    # Larger elements first: without gaps, every entry is then aligned to its element's size.
    for name, column in sorted(columns, key=lambda entry: _itemsize(entry[1].dtype), reverse=True):
        layout.rows(name, column)
    for name, pieces in scales:
        layout.numbers(name, "BF16", pieces)
    for name, pieces in codes:
        layout.numbers(name, "U8", pieces)
    about = {
        "sections": orjson.dumps([[s.group, list(s.columns), len(s.spans)] for s in sections]).decode(),
        "refresh": orjson.dumps([_about_refresh(refresh) for refresh in refreshes]).decode(),
        "tables": f"{checksum(b''.join(tables)):016x}",
    }
    return about, layout.entries, chain(tables, chain.from_iterable(data() for data in layout.data))


def _about_refresh(refresh: Refresh) -> list[Any]:
    slots = {
        slot: [found.codec, *(f"{_checksum_of(pieces):016x}" for pieces in (found.codes, found.scales))]
        for slot, found in refresh.slots.items()
    }
    return [refresh.group, slots, len(refresh.spans)]


def _checksum_of(pieces: Iterable[memoryview]) -> int:
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()


class _Layout:
    """The entries of a file, one behind the other, and what gives their bytes."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}
        self.data: list[Callable[[], Iterable[memoryview]]] = []
        self._names: set[str] = set(_Tables._fields)
        self._end = 0

    def name(self, *parts: str) -> str:
        return _new_name("/".join(parts), self._names)

    def table(self, name: str, dtype: str, table: "np.ndarray[Any, Any]") -> bytes:
        self._add(name, dtype, table.shape, table.nbytes)
        return table.tobytes()

    def rows(self, name: str, column: Column) -> None:
        row_nbytes = math.prod(column.row_shape) * _itemsize(column.dtype)
        count = column.nbytes // row_nbytes if row_nbytes else 0
        self._add(name, column.dtype, (count, *column.row_shape), column.nbytes)
        self.data.append(column.data)

    def numbers(self, name: str, dtype: str, pieces: Sequence[memoryview]) -> None:
        nbytes = sum(map(len, pieces))
        self._add(name, dtype, (nbytes // _itemsize(dtype),), nbytes)
        self.data.append(lambda: pieces)

    def _add(self, name: str, dtype: str, shape: Sequence[int], nbytes: int) -> None:
        offsets = [self._end, self._end + nbytes]
        self.entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        self._end += nbytes


def _new_name(name: str, taken: set[str]) -> str:
    # A merged delta may hold one group in several sections, before and after its optimizer state appeared.
    while name in taken:
        name += "'"
    taken.add(name)
    return name


def _itemsize(dtype: str) -> int:
    return {"BOOL": 1, "BF16": 2}.get(dtype) or int(dtype[1:]) // 8


class _Tables(NamedTuple):
    """The numbers behind the header."""

    blocks: "np.ndarray[Any, Any]"
    checksums: "np.ndarray[Any, Any]"
    refreshed: "np.ndarray[Any, Any]"

    @classmethod
    def read(cls, read: Callable[[int], bytes], metadata: dict[str, str], entries: dict[str, Any]) -> "_Tables":
        sizes = [entries[name]["data_offsets"][1] - entries[name]["data_offsets"][0] for name in cls._fields]
        data = read(sum(sizes))
        if f"{checksum(data):016x}" != metadata["tables"]:
            raise ValueError("checksum of the tables")
        ends = list(accumulate(sizes, initial=0))
        blocks, sums, refreshed = (data[start:stop] for start, stop in pairwise(ends))
        return cls(
            np.frombuffer(blocks, "<i8").reshape(-1, 5),
            np.frombuffer(sums, "<u8"),
            np.frombuffer(refreshed, "<i8").reshape(-1, 4),
        )


def contents(
    read: Callable[[int], bytes], metadata: dict[str, str], entries: dict[str, Any], data_start: int
) -> tuple[list[StoredBlock], list[StoredRefresh]]:
    """What a delta holds.

    Args:
        read: Reads on behind the header.
        metadata: The strings in the header.
        entries: The entries in the header, by name.
        data_start: Where the data begin in the file.

    Raises:
        ValueError: If the tables do not match their checksum.
        KeyError: If something is missing.

    """
    tables, names = _Tables.read(read, metadata, entries), set(_Tables._fields)
    blocks: list[StoredBlock] = []
    at = sums = 0
    for group, slots, count in orjson.loads(metadata["sections"]):
        rows = tables.blocks[at : at + count].tolist()
        checksums = tables.checksums[sums : sums + count * len(slots)].reshape(len(slots), count)
        at, sums = at + count, sums + checksums.size
        columns = {slot: entries[_new_name(f"{group}/{slot}", names)] for slot in slots}
        section = _StoredSection(columns, [(first, last) for first, last, *_ in rows], checksums, data_start)
        blocks += (
            StoredBlock(group, (first, last), Version(*version), partial(section.slots, i))
            for i, (first, last, *version) in enumerate(rows)
        )
    return blocks, list(_refreshes(orjson.loads(metadata["refresh"]), tables.refreshed, entries, names, data_start))


def _refreshes(
    about: list[Any], table: "np.ndarray[Any, Any]", entries: dict[str, Any], names: set[str], data_start: int
) -> Iterator[StoredRefresh]:
    found = {
        (group, slot, kind): entries[_new_name(f"refresh/{group}/{slot}/{kind}", names)]
        for kind in ("codes", "scales")
        for group, slots, _ in about
        for slot in slots
    }
    at = 0
    for group, slots, count in about:
        rows = table[at : at + count].tolist()
        at += count
        by_slot = {
            slot: StoredSlot(
                codec,
                _entry(found[group, slot, "codes"], data_start, codes),
                _entry(found[group, slot, "scales"], data_start, scales),
            )
            for slot, (codec, codes, scales) in slots.items()
        }
        yield StoredRefresh(group, [(row[0], row[1]) for row in rows], [(row[2], row[3]) for row in rows], by_slot)


def _entry(raw: dict[str, Any], data_start: int, checksum: str) -> Entry:
    start, stop = raw["data_offsets"]
    return Entry(raw["dtype"], data_start + start, data_start + stop, int(checksum, 16))


class _StoredSection:
    """The columns of a section in a file."""

    def __init__(
        self,
        columns: dict[str, dict[str, Any]],
        spans: list[Span],
        checksums: "np.ndarray[Any, Any]",
        data_start: int,
    ) -> None:
        self._columns = columns
        self._checksums = checksums
        self._data_start = data_start
        self._rows = list(accumulate((last - first for first, last in spans), initial=0))

    def slots(self, i: int) -> dict[str, Entry]:
        """Where the slots of its block ``i`` lie."""
        found = {}
        for (slot, raw), sums in zip(self._columns.items(), self._checksums, strict=True):
            start, stop = raw["data_offsets"]
            if self._rows[-1]:
                row_bytes = (stop - start) // self._rows[-1]
                start, stop = start + self._rows[i] * row_bytes, start + self._rows[i + 1] * row_bytes
            found[slot] = Entry(raw["dtype"], self._data_start + start, self._data_start + stop, int(sums[i]))
        return found
