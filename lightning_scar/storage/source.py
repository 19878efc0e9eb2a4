"""Where entries are read from: a mapped file where there is one, else a stream."""

import mmap
import os
from contextlib import AbstractContextManager
from typing import IO, Protocol

import numpy as np
from typing_extensions import Self

# Reads the pages in now, and fails with an error where touching them later would kill the process. Linux >= 5.14; the
# mmap module does not name it.
_POPULATE_READ = 22


class Source(Protocol):
    """Bytes of one delta."""

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
        mapped.madvise(_POPULATE_READ)
        self._bytes = np.frombuffer(mapped, dtype=np.uint8)

    def read_into(self, start: int, into: memoryview) -> bool:
        """See :class:`Source`."""
        found = self._bytes[start - self._offset : start - self._offset + len(into)]
        if len(found) < len(into):
            return False
        # numpy lets other threads run while it copies; a memoryview would not.
        np.copyto(np.frombuffer(into, dtype=np.uint8), found)
        return True

    def __exit__(self, *exception: object) -> None:
        """Lets go of the mapping."""
        del self._bytes


class StreamSource(AbstractContextManager["StreamSource"]):
    """An open file of any file system.

    Args:
        file: The file; closed at the end.

    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

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
