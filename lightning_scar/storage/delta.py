"""The delta file: what one save writes. A safetensors file that checks itself.

``safetensors.safe_open`` reads it: 8 bytes with the header's length, a JSON header, the data. One entry holds one slot
(``param``, ``exp_avg``, ...) of one block; ``__metadata__`` holds the table of the blocks with a version for each block
and a checksum (XXH3, 64 bits) for each entry, and a checksum of the header itself. The data's checksums are verified
when they are read; the header's decides whether the file counts at all.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import orjson
import xxhash

from lightning_scar.storage.directory import Directory
from lightning_scar.storage.head import Head, Version
from lightning_scar.storage.source import Source

FORMAT_VERSION = 1
SUFFIX = ".safetensors"
_NO_CHECKSUM = "0" * 16
_HEADER_READAHEAD = 1 << 16


class StorageError(RuntimeError):
    """Something on disk is not what it should be."""


class DamagedError(StorageError):
    """A delta, or an entry of one, does not match its checksum or ends too early."""


class NewerFormatError(StorageError):
    """A delta was written by a newer version of this library."""


class Entry(NamedTuple):
    """Where one slot of a block lies in its file.

    Attributes:
        dtype: The safetensors name of the data type.
        shape: The shape of the block's rows.
        start: Offset of the first byte in the file.
        stop: Offset behind the last byte.
        checksum: XXH3 of the bytes, in hexadecimal.

    """

    dtype: str
    shape: Sequence[int]
    start: int
    stop: int
    checksum: str


class StoredBlock:
    """One version of one block in a delta.

    Args:
        key: The block's name.
        version: Which version.
        place: How many blocks lie before it in the delta.
        checksums: The checksum of each of its slots.
        header: The entries of the delta's header.
        data_start: Where the data begin in the file.

    """

    def __init__(
        self, key: str, version: Version, place: int, checksums: dict[str, str], header: dict[str, Any], data_start: int
    ) -> None:
        self.key = key
        self.version = version
        self.place = place
        self._checksums = checksums
        self._header = header
        self._data_start = data_start

    @cached_property
    def slots(self) -> dict[str, Entry]:
        """The entries by slot, looked up when they are asked for: of tens of thousands in a directory few are read."""
        found, base = {}, self._data_start
        for slot, expected in self._checksums.items():
            raw = self._header[_entry_name(self.key, slot, self.version)]
            start, stop = raw["data_offsets"]
            found[slot] = Entry(raw["dtype"], raw["shape"], base + start, base + stop, expected)
        return found

    def new_memory(self) -> dict[str, memoryview]:
        """Memory to read the block into."""
        return {slot: memoryview(bytearray(entry.stop - entry.start)) for slot, entry in self.slots.items()}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the block's entries."""
        return sum(entry.stop - entry.start for entry in self.slots.values())

    @property
    def extent(self) -> tuple[int, int]:
        """Offset of the block's first byte in the file, and the offset behind its last."""
        return min(entry.start for entry in self.slots.values()), max(entry.stop for entry in self.slots.values())


@dataclass(frozen=True)
class Delta:
    """A delta file whose header is intact.

    Attributes:
        directory: Where it lies; the same name may mean another file elsewhere.
        name: Its name there.
        nbytes: Its size.
        head: What it says about itself.
        blocks: What it holds.

    """

    directory: Directory
    name: str
    nbytes: int
    head: Head
    blocks: tuple[StoredBlock, ...]

    @property
    def file(self) -> str:
        """Its full path."""
        return self.directory.file(self.name)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of its blocks, without the header."""
        return sum(block.nbytes for block in self.blocks)


@dataclass(frozen=True)
class Payload:
    """One slot of a block on its way into a file.

    Attributes:
        dtype: The safetensors name of the data type.
        shape: The shape of the block's rows.
        nbytes: How many bytes there are.
        checksum: Their checksum.
        data: Gives the bytes, when their turn has come.

    """

    dtype: str
    shape: Sequence[int]
    nbytes: int
    checksum: str
    data: Callable[[], memoryview]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.nbytes // max(1, math.prod(self.shape))


class BlockData(NamedTuple):
    """One block on its way into a file."""

    key: str
    version: Version
    slots: Mapping[str, Payload]


def checksum(data: bytes | memoryview) -> str:
    """The checksum of an entry: XXH3 with 64 bits, in hexadecimal.

    Example::

        >>> checksum(b"scar")
        '2473c2ef04edd4aa'

    """
    return xxhash.xxh3_64_hexdigest(data)


def encode(head: Head, blocks: Sequence[BlockData]) -> Iterator[bytes | memoryview]:
    """The bytes of a delta, piece by piece.

    Args:
        head: What the delta says about itself.
        blocks: The blocks to put in.

    Yields:
        The header with its own checksum in it, then each slot's bytes.

    """
    # Larger elements first: without gaps, every entry is then aligned to its element's size.
    slots = [(block, slot, payload) for block in blocks for slot, payload in block.slots.items()]
    slots.sort(key=lambda item: item[2].itemsize, reverse=True)
    entries: dict[str, Any] = {}
    position = 0
    for block, slot, payload in slots:
        offsets = [position, position := position + payload.nbytes]
        name = _entry_name(block.key, slot, block.version)
        entries[name] = {"dtype": payload.dtype, "shape": list(payload.shape), "data_offsets": offsets}
    table = [
        [key, version.incarnation, version.sequence, version.step, {slot: p.checksum for slot, p in slots.items()}]
        for key, version, slots in blocks
    ]
    yield from _header({"head": head.to_json(), "blocks": orjson.dumps(table).decode()}, entries)
    for _, _, payload in slots:
        yield payload.data()


def _header(metadata: dict[str, str], entries: dict[str, Any]) -> Iterator[bytes]:
    metadata = {"format": str(FORMAT_VERSION), "header_checksum": _NO_CHECKSUM, **metadata}
    text = orjson.dumps({"__metadata__": metadata, **entries})
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text.replace(_NO_CHECKSUM.encode(), checksum(text).encode(), 1)


def _entry_name(key: str, slot: str, version: Version) -> str:
    # With the version: a merged delta may hold two versions of a block.
    return f"{key}/{slot}@{version.incarnation}.{version.sequence}"


def read_delta(directory: Directory, name: str) -> Delta:
    """Reads a delta's header and checks it.

    Args:
        directory: Where the file lies.
        name: The file's name.

    Raises:
        DamagedError: If the header does not match its checksum, or the file ends before its data do.
        NewerFormatError: If a newer version of this library wrote the file.
        FileNotFoundError: If the file is gone.

    """
    with directory.open(name, readahead=_HEADER_READAHEAD) as file:
        size = file.seek(0, 2)
        file.seek(0)
        # A damaged length may be any number; what is cut short here fails its checksum below.
        text = file.read(min(int.from_bytes(file.read(8), "little"), size))
    try:
        metadata, entries = _checked_header(text)
        head = Head.from_json(metadata["head"])
        blocks = tuple(_blocks(orjson.loads(metadata["blocks"]), entries, 8 + len(text)))
    except NewerFormatError as error:
        raise NewerFormatError(f"{directory.file(name)} {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{directory.file(name)} is damaged: its header does not hold ({error!r})") from None
    end = 8 + len(text) + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end > size:
        raise DamagedError(f"{directory.file(name)} is damaged: {size} bytes long, its data end at {end}")
    return Delta(directory, name, size, head, blocks)


def _checked_header(text: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    entries = orjson.loads(text)
    metadata = entries.pop("__metadata__")
    # Before the checksum: a newer format may well compute it in another way.
    if int(metadata["format"]) > FORMAT_VERSION:
        raise NewerFormatError(
            f"has format {metadata['format']}, this version of lightning-scar reads up to {FORMAT_VERSION}: "
            "upgrade lightning-scar"
        )
    expected = metadata["header_checksum"]
    if checksum(text.replace(expected.encode(), _NO_CHECKSUM.encode(), 1)) != expected:
        raise ValueError("checksum")
    return metadata, entries


def _blocks(table: list[Any], header: dict[str, Any], data_start: int) -> Iterator[StoredBlock]:
    for place, (key, incarnation, sequence, step, checksums) in enumerate(table):
        yield StoredBlock(key, Version(incarnation, sequence, step), place, checksums, header, data_start)


def read_blocks(source: Source, blocks: Iterable[tuple[StoredBlock, Mapping[str, memoryview]]]) -> None:
    """Reads blocks into ready memory and verifies their checksums.

    Args:
        source: The open delta.
        blocks: Which blocks, and writable bytes for each of their slots.

    Raises:
        DamagedError: If an entry cannot be read, or a block has other slots.

    """
    entries: list[tuple[Entry, memoryview]] = []
    for block, into in blocks:
        if block.slots.keys() != into.keys():
            raise DamagedError("its slots are not those of the block map")
        entries += [(entry, into[slot]) for slot, entry in block.slots.items()]
    read_entries(source, entries)


def read_entries(source: Source, entries: Sequence[tuple[Entry, memoryview]]) -> None:
    """Reads entries into ready memory and verifies their checksums.

    Args:
        source: The open delta.
        entries: Which entries, and writable bytes for each.

    Raises:
        DamagedError: If the file ends too early, the bytes do not match their checksum, or there are not as many.

    """
    if any(len(into) != entry.stop - entry.start for entry, into in entries):
        raise DamagedError("its size is not that of the block map")
    if not source.fill([(entry.start, into) for entry, into in entries]):
        raise DamagedError("the file ends too early")
    if any(checksum(into) != entry.checksum for entry, into in entries):
        raise DamagedError("the bytes do not match their checksum")
