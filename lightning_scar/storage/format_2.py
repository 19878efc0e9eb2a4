"""Format 2 of the delta: a section of rows for each group, and its refresh.

Each slot (``param``, ``exp_avg``, ...) of a section has one entry with the rows of its blocks, one block after the
other. Each slot of the refresh has one entry of codes and one of scales, one group after the other. Tables at the
beginning of the data hold the rows, version and checksum of each block.
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
) -> tuple[dict[str, str], dict[str, Any], bytes, Callable[[], Iterator[memoryview]]]:
    """Lay out a delta.

    Args:
        sections: The blocks.
        refreshes: The refreshes, at most one per group.

    Returns:
        The header's metadata, its entries, the tables, and a function that yields the other data in pieces.

    """
    layout = _Layout()
    blocks = [(*span, *version) for s in sections for span, version in zip(s.spans, s.versions, strict=True)]
    sums = [number for section in sections for column in section.columns.values() for number in column.checksums]
    refreshed = np.concatenate([np.empty((0, 4), "<i8"), *(refresh.rows for refresh in refreshes)])
    encoded = [(slot, found) for refresh in refreshes for slot, found in refresh.slots.items()]
    places = [_place(pieces) for _, found in encoded for pieces in (found.codes, found.scales)]
    tables = (
        layout.table("blocks", np.array(blocks, dtype="<i8").reshape(-1, 5))
        + layout.table("checksums", np.array(sums, dtype="<u8"))
        + layout.table("refreshed", _narrow(refreshed))
        + layout.table("encoded", np.array(places, dtype="<u8").reshape(-1, 4))
    )
    # Names are assigned in the order of the header, not of the data.
    columns = [(layout.name(s.group, slot), column) for s in sections for slot, column in s.columns.items()]
    slots = [(layout.name("refresh", slot), slot) for slot in dict.fromkeys(slot for slot, _ in encoded)]
    # Larger elements first: every entry is then aligned to its element size without gaps.
    for name, column in sorted(columns, key=lambda entry: _itemsize(entry[1].dtype), reverse=True):
        layout.rows(name, column)
    for name, slot in slots:
        layout.numbers(
            f"{name}/scales", "BF16", [piece for of, found in encoded if of == slot for piece in found.scales]
        )
    for name, slot in slots:
        layout.numbers(f"{name}/codes", "U8", [piece for of, found in encoded if of == slot for piece in found.codes])
    codecs = [[r.group, {slot: found.codec for slot, found in r.slots.items()}, len(r.rows)] for r in refreshes]
    about = {
        "sections": orjson.dumps([[s.group, list(s.columns), len(s.spans)] for s in sections]).decode(),
        "refresh": orjson.dumps(codecs).decode(),
        "tables": f"{checksum(tables):016x}",
    }
    return about, layout.entries, tables, lambda: chain.from_iterable(data() for data in layout.data)


def _narrow(table: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Return a table as 32-bit integers, if its values fit: this one is the largest."""
    return table.astype("<i4") if table.size and table.max() <= np.iinfo("<i4").max else table


def _place(pieces: Iterable[memoryview]) -> tuple[int, int]:
    """Return the number of bytes and their checksum."""
    digest, nbytes = xxhash.xxh3_64(), 0
    for piece in pieces:
        digest.update(piece)
        nbytes += len(piece)
    return nbytes, digest.intdigest()


_TABLES = {"<i4": "I32", "<i8": "I64", "<u8": "U64"}


class _Layout:
    """The entries of a file, one after the other, and functions that yield their bytes."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}
        self.data: list[Callable[[], Iterable[memoryview]]] = []
        self._names: set[str] = set(_Tables._fields)
        self._end = 0

    def name(self, *parts: str) -> str:
        return _new_name("/".join(parts), self._names)

    def table(self, name: str, table: "np.ndarray[Any, Any]") -> bytes:
        self._add(name, _TABLES[table.dtype.str], table.shape, table.nbytes)
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
    """The tables after the header."""

    blocks: "np.ndarray[Any, Any]"
    checksums: "np.ndarray[Any, Any]"
    refreshed: "np.ndarray[Any, Any]"
    encoded: "np.ndarray[Any, Any]"

    @classmethod
    def read(cls, read: Callable[[int], bytes], metadata: dict[str, str], entries: dict[str, Any]) -> "_Tables":
        about = [entries[name] for name in cls._fields]
        sizes = [stop - start for start, stop in (each["data_offsets"] for each in about)]
        data = read(sum(sizes))
        if f"{checksum(data):016x}" != metadata["tables"]:
            raise ValueError("checksum of the tables")
        types = {name: dtype for dtype, name in _TABLES.items()}
        ends = pairwise(accumulate(sizes, initial=0))
        return cls(
            *(
                np.frombuffer(data[start:stop], types[each["dtype"]]).reshape(each["shape"])
                for each, (start, stop) in zip(about, ends, strict=True)
            )
        )


def contents(
    read: Callable[[int], bytes], metadata: dict[str, str], entries: dict[str, Any], data_start: int
) -> tuple[list[StoredBlock], list[StoredRefresh]]:
    """Return the contents of a delta.

    Args:
        read: Reads on after the header.
        metadata: The strings in the header.
        entries: The entries in the header, by name.
        data_start: The offset of the data in the file.

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
    return blocks, list(_refreshes(orjson.loads(metadata["refresh"]), tables, entries, names, data_start))


def _refreshes(
    about: list[Any], tables: _Tables, entries: dict[str, Any], names: set[str], data_start: int
) -> Iterator[StoredRefresh]:
    slots = dict.fromkeys(slot for _, codecs, _ in about for slot in codecs)
    columns = {slot: _new_name(f"refresh/{slot}", names) for slot in slots}
    ends = {
        (slot, kind): data_start + entries[f"{name}/{kind}"]["data_offsets"][0]
        for slot, name in columns.items()
        for kind in ("codes", "scales")
    }

    def entry(slot: str, kind: str, dtype: str, nbytes: int, checksum: int) -> Entry:
        start = ends[slot, kind]
        ends[slot, kind] += nbytes
        return Entry(dtype, start, start + nbytes, checksum)

    places, at = iter(tables.encoded.tolist()), 0
    for group, codecs, count in about:
        rows = tables.refreshed[at : at + count]
        at += count
        found = {}
        for slot, codec in codecs.items():
            codes, codes_checksum, scales, scales_checksum = next(places)
            codes_entry = entry(slot, "codes", "U8", codes, codes_checksum)
            found[slot] = StoredSlot(codec, codes_entry, entry(slot, "scales", "BF16", scales, scales_checksum))
        yield StoredRefresh(group, rows, found)


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
        """Return the places of the slots of block ``i``."""
        found = {}
        for (slot, raw), sums in zip(self._columns.items(), self._checksums, strict=True):
            start, stop = raw["data_offsets"]
            if self._rows[-1]:
                row_bytes = (stop - start) // self._rows[-1]
                start, stop = start + self._rows[i] * row_bytes, start + self._rows[i + 1] * row_bytes
            place = self._data_start + start, self._data_start + stop
            found[slot] = Entry(raw["dtype"], *place, int(sums[i]), tuple(raw["shape"][1:]))
        return found
