"""Where entries are read from: a mapped file where there is one, else a stream."""

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import IO, Protocol

import numpy as np
from typing_extensions import Self

# Reads the pages in now, and fails with an error where touching them later would kill the process. Linux >= 5.14; the
# mmap module does not name it.
_POPULATE_READ = 22
#: Spans no further apart than this are fetched as one.
_GAP = 64 * 1024


class Source(Protocol):
    """Bytes of one delta."""

    def expect(self, spans: Iterable[tuple[int, int]]) -> None:
        """Says what will be read, in order of its place, so that it may be fetched ahead."""

    def read_into(self, start: int, into: memoryview) -> bool:
        """Fills ``into`` with the bytes from ``start`` on; ``False`` where the file ends too early."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


class MappedSource(AbstractContextManager["MappedSource"]):
    """A stretch of a local file, mapped: half the cost of reading it.

    Args:
        path: The file.
        start: The first byte that will be read.
        stop: The byte behind the last.

    Raises:
        OSError: If the pages cannot be read in, or the system cannot promise that they are.

    """

    def __init__(self, path: str, start: int, stop: int) -> None:
        with open(path, "rb") as file:
            stop = min(stop, os.fstat(file.fileno()).st_size)
            self._offset = min(start, stop) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            if stop == self._offset:
                raise OSError(f"{path} holds nothing to map")
            mapped = mmap.mmap(file.fileno(), stop - self._offset, access=mmap.ACCESS_READ, offset=self._offset)
        mapped.madvise(_POPULATE_READ, 0, 1)  # Fails where the system does not know it.
        self._map = mapped
        self._bytes = np.frombuffer(mapped, dtype=np.uint8)

    def expect(self, spans: Iterable[tuple[int, int]]) -> None:
        """See :class:`Source`. Only these: most of an old delta may be dead."""
        for start, stop in _joined(spans):
            self._advise(mmap.MADV_WILLNEED, start, stop)

    def read_into(self, start: int, into: memoryview) -> bool:
        """See :class:`Source`."""
        found = self._bytes[start - self._offset : start - self._offset + len(into)]
        if len(found) < len(into):
            return False
        self._advise(_POPULATE_READ, start, start + len(into))
        # numpy lets other threads run while it copies; a memoryview would not.
        np.copyto(np.frombuffer(into, dtype=np.uint8), found)
        return True

    def __exit__(self, *exception: object) -> None:
        """Lets go of the mapping."""
        del self._bytes, self._map

    def _advise(self, option: int, start: int, stop: int) -> None:
        first = (start - self._offset) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop - self._offset > first:
            self._map.madvise(option, first, stop - self._offset - first)


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Neighbouring spans as one."""
    spans = iter(spans)
    start, stop = next(spans, (0, 0))
    for next_start, next_stop in spans:
        if next_start - stop > _GAP:
            yield start, stop
            start, stop = next_start, next_stop
        stop = max(stop, next_stop)
    yield start, stop


class StreamSource(AbstractContextManager["StreamSource"]):
    """An open file of any file system.

    Args:
        file: The file; closed at the end.

    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def expect(self, spans: Iterable[tuple[int, int]]) -> None:
        """See :class:`Source`. The file system reads ahead as it sees fit."""

    def read_into(self, start: int, into: memoryview) -> bool:
        """See :class:`Source`."""
        self._file.seek(start)
        done = 0
        while done < len(into):
            count = self._file.readinto(into[done:])  # type: ignore[attr-defined]
            if not count:
                return False
            done += count
        return True

    def __exit__(self, *exception: object) -> None:
        """Closes the file."""
        self._file.close()
