"""Where entries are read from: one open file of any file system."""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import IO

#: Spans no further apart than this are fetched as one.
_GAP = 64 * 1024
#: More pieces than this are not read in one call; systems allow 16 or more.
_MANY = 16


class Source(AbstractContextManager["Source"]):
    """Bytes of one delta, read into ready memory.

    Args:
        file: The open file; closed at the end.

    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._is_local = isinstance(file, io.FileIO) and hasattr(os, "preadv")

    def expect(self, spans: Iterable[tuple[int, int]]) -> None:
        """Says what will be read, in order of its place: a local file is fetched ahead from there, and nowhere else.

        Most of an old delta may be dead. Other file systems read ahead as they see fit.
        """
        if self._is_local and hasattr(os, "posix_fadvise"):
            for start, stop in _joined(spans):
                os.posix_fadvise(self._file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)

    def fill(self, pieces: Sequence[tuple[int, memoryview]]) -> bool:
        """Fills memories, each with the bytes from its offset on; ``False`` where the file ends too early."""
        if self._is_local and 0 < len(pieces) <= _MANY and _are_neighbours(pieces):
            # In one call, since each one gives the interpreter to another thread and has to win it back.
            count = os.preadv(self._file.fileno(), [into for _, into in pieces], pieces[0][0])
            if count == sum(len(into) for _, into in pieces):
                return True
        if not self._is_local and len(pieces) > 1 and _are_neighbours(pieces):
            return self._fill_together(pieces)
        return all(self._fill(start, into) for start, into in pieces)

    def _fill_together(self, pieces: Sequence[tuple[int, memoryview]]) -> bool:
        """In one request, where each costs a round trip."""
        together = memoryview(bytearray(sum(len(into) for _, into in pieces)))
        if not self._fill(pieces[0][0], together):
            return False
        for _, into in pieces:
            into[:], together = together[: len(into)], together[len(into) :]
        return True

    def _fill(self, start: int, into: memoryview) -> bool:
        self._file.seek(start)
        while into:
            count = self._file.readinto(into)  # type: ignore[attr-defined]
            if not count:
                return False
            into = into[count:]
        return True

    def __exit__(self, *exception: object) -> None:
        """Closes the file."""
        self._file.close()


def _are_neighbours(pieces: Sequence[tuple[int, memoryview]]) -> bool:
    return all(start + len(into) == following for (start, into), (following, _) in pairwise(pieces))


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
