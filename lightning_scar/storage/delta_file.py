"""The file of a delta: safetensors with checksums.

``safetensors.safe_open`` reads it: 8 bytes with the header's length, a JSON header, the data. The header's own checksum
(XXH3, 64 bits) decides whether the file counts; those of the data are verified when they are read.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import chain
from typing import IO, Any

import orjson
from typing_extensions import override

from lightning_scar.storage import format_1, format_2
from lightning_scar.storage.delta import (
    DamagedError,
    Delta,
    Encoded,
    Entry,
    NewerFormatError,
    Refresh,
    Section,
    StoredBlock,
    StoredRefresh,
    checksum,
)
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.head import Head
from lightning_scar.storage.source import Source

FORMAT_VERSION = 2
_NO_CHECKSUM = "0" * 16
_HEADER_READAHEAD = 1 << 17


@dataclass(frozen=True)
class DeltaFile(Iterable[bytes | memoryview]):
    """A delta to be written: its bytes in pieces, which may be iterated more than once.

    Attributes:
        front: Header and tables: all that :func:`read_delta` reads.
        data: Yields the rest.
        nbytes: Bytes of both.

    """

    front: bytes
    data: Callable[[], Iterator[memoryview]]
    nbytes: int

    @override
    def __iter__(self) -> Iterator[bytes | memoryview]:
        """Iterate over all bytes from the beginning."""
        return chain((self.front,), self.data())

    def write(self, directory: Directory, name: str) -> Delta:
        """Write it durably, and return the delta without reading it back.

        Raises:
            OSError: If it cannot be written.

        """
        directory.write(name, self)
        return _parse(directory, name, BytesIO(self.front), self.nbytes)


def encode(head: Head, sections: Sequence[Section], refreshes: Sequence[Refresh] = ()) -> DeltaFile:
    """Lay out the file of a delta.

    Args:
        head: The delta's metadata.
        sections: The blocks.
        refreshes: The refreshes, at most one per group.

    """
    about, entries, tables, data = format_2.encode(sections, refreshes)
    front = _header({"head": head.to_json(), **about}, entries)
    return DeltaFile(front + tables, data, len(front) + _end(entries))


def _header(metadata: dict[str, str], entries: dict[str, Any]) -> bytes:
    metadata = {"format": str(FORMAT_VERSION), "header_checksum": _NO_CHECKSUM, **metadata}
    text = orjson.dumps({"__metadata__": metadata, **entries})
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text.replace(_NO_CHECKSUM.encode(), f"{checksum(text):016x}".encode(), 1)


def _end(entries: dict[str, Any]) -> int:
    return max((entry["data_offsets"][1] for entry in entries.values()), default=0)


def read_delta(directory: Directory, name: str) -> Delta:
    """Read and verify a delta's header.

    Args:
        directory: The file's directory.
        name: The file's name.

    Raises:
        DamagedError: If the header does not match its checksum, or the file is truncated.
        NewerFormatError: If a newer version of this library wrote the file.
        FileNotFoundError: If the file is gone.

    """
    try:
        with directory.open(name, readahead=_HEADER_READAHEAD) as file:
            size = file.seek(0, 2)
            file.seek(0)
            return _parse(directory, name, file, size)
    except DamagedError:
        if (further := directory.further(name)) is None:
            raise
        return replace(read_delta(further, name), directory=directory)


def _parse(directory: Directory, name: str, file: IO[bytes], size: int) -> Delta:
    # A damaged length may be any number; a truncated header fails its checksum below.
    text = file.read(min(int.from_bytes(file.read(8), "little"), size))
    try:
        metadata, entries = _checked_header(text)
        head, start = Head.from_json(metadata["head"]), 8 + len(text)
        contents = format_1.contents if metadata["format"] == "1" else format_2.contents
        blocks, refreshes = contents(file.read, metadata, entries, start)
    except NewerFormatError as error:
        raise NewerFormatError(f"{directory.file(name)} {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{directory.file(name)} is damaged: its header is invalid ({error!r})") from None
    end = start + _end(entries)
    if end > size:
        raise DamagedError(f"{directory.file(name)} is damaged: it has {size} bytes, but its data end at {end}")
    return Delta(directory, name, size, head, tuple(blocks), tuple(refreshes))


def _checked_header(text: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    entries = orjson.loads(text)
    metadata = entries.pop("__metadata__")
    # Before the checksum, which a newer format may compute differently.
    if int(metadata["format"]) > FORMAT_VERSION:
        raise NewerFormatError(
            f"has format {metadata['format']}, but this version of lightning-scar reads up to {FORMAT_VERSION}: "
            "upgrade lightning-scar"
        )
    expected = metadata["header_checksum"]
    if f"{checksum(text.replace(expected.encode(), _NO_CHECKSUM.encode(), 1)):016x}" != expected:
        raise ValueError("checksum")
    return metadata, entries


def read_blocks(source: Source, blocks: Iterable[tuple[StoredBlock, Mapping[str, memoryview], Container[str]]]) -> None:
    """Read blocks into given memory and verify their checksums.

    Args:
        source: The open delta.
        blocks: Which blocks, writable bytes for each of their slots, and the slots to leave out.

    Raises:
        DamagedError: If an entry cannot be read, or a block has different slots.

    """
    entries: list[tuple[Entry, memoryview]] = []
    for block, into, left_out in blocks:
        if block.slots.keys() != into.keys():
            raise DamagedError("its slots differ from those of the block map")
        entries += [(entry, into[slot]) for slot, entry in block.slots.items() if slot not in left_out]
    read_entries(source, entries)


def read_refresh(source: Source, stored: StoredRefresh) -> Refresh:
    """Read the refresh of a group and verify its checksums.

    Args:
        source: The open delta.
        stored: Which refresh.

    Raises:
        DamagedError: If an entry cannot be read.

    """
    memory = stored.new_memory()
    places = ((stored.slots[slot], into) for slot, into in memory.items())
    read_entries(source, [pair for slot, into in places for pair in zip((slot.codes, slot.scales), into, strict=True)])
    slots = {slot: Encoded(stored.slots[slot].codec, [codes], [scales]) for slot, (codes, scales) in memory.items()}
    return Refresh(stored.group, stored.rows, slots)


def read_entries(source: Source, entries: Sequence[tuple[Entry, memoryview]]) -> None:
    """Read entries into given memory and verify their checksums.

    Args:
        source: The open delta.
        entries: Which entries, and writable bytes for each.

    Raises:
        DamagedError: If the file ends too early, or the bytes do not match their checksum or the memory's size.

    """
    if any(len(into) != entry.nbytes for entry, into in entries):
        raise DamagedError("its size differs from that of the block map")
    # Consecutive blocks have adjacent rows in each slot: in order of offset they make few, long reads.
    if not source.fill([(entry.start, into) for entry, into in sorted(entries, key=lambda item: item[0].start)]):
        raise DamagedError("the file ends too early")
    if any(checksum(into) != entry.checksum for entry, into in entries):
        raise DamagedError("the bytes do not match their checksum")
