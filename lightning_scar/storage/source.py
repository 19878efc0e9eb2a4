"""An open file on any file system, from which entries are read."""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import IO

#: Spans no further apart than this are fetched as one.
_GAP = 64 * 1024
#: The most pieces read in one call: the limit of most systems.
_MANY = min(1024, os.sysconf("SC_IOV_MAX") if hasattr(os, "sysconf") else 16)


class Source(AbstractContextManager["Source"]):
    """The open file of one delta, read into given memory.

    Args:
        file: The open file; closed on exit.

    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._is_local = isinstance(file, io.FileIO) and hasattr(os, "preadv")
        #: ``os.preadv`` without its first argument, if the file system has it.
        self._preadv: Callable[[Sequence[memoryview], int], int] | None = getattr(file, "preadv", None)
        if self._is_local:
            self._preadv = partial(os.preadv, file.fileno())

    def expect(self, spans: Iterable[tuple[int, int]]) -> None:
        """Announce what will be read, in order of offset, so that only this part of a local file is prefetched.

        Most of an old delta may be dead. Other file systems choose their own readahead.
        """
        if self._is_local and hasattr(os, "posix_fadvise"):
            for start, stop in _joined(spans):
                os.posix_fadvise(self._file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)

    def fill(self, pieces: Sequence[tuple[int, memoryview]]) -> bool:
        """Fill each piece of memory from its offset; return ``False`` if the file ends too early."""
        return all(self._fill_together(stretch) for stretch in _stretches(pieces))

    def _fill_together(self, pieces: Sequence[tuple[int, memoryview]]) -> bool:
        """Read in one call: each costs a round trip, or releases the GIL and has to reacquire it."""
        if len(pieces) == 1:
            return self._fill(*pieces[0])
        start, memories = pieces[0][0], [into for _, into in pieces]
        if self._preadv is not None:
            is_all = self._preadv(memories, start) == sum(map(len, memories))
            return is_all or all(self._fill(start, into) for start, into in pieces)
        together = memoryview(bytearray(sum(map(len, memories))))
        if not self._fill(start, together):
            return False
        for into in memories:
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
        """Close the file."""
        self._file.close()


def _stretches(pieces: Sequence[tuple[int, memoryview]]) -> Iterator[Sequence[tuple[int, memoryview]]]:
    """Yield runs of pieces that are contiguous in the file, as many as one call takes."""
    first = 0
    for i, (start, into) in enumerate(pieces, start=1):
        if i == len(pieces) or i - first == _MANY or pieces[i][0] != start + len(into):
            yield pieces[first:i]
            first = i


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Merge neighbouring spans."""
    spans = iter(spans)
    start, stop = next(spans, (0, 0))
    for next_start, next_stop in spans:
        if next_start - stop > _GAP:
            yield start, stop
            start, stop = next_start, next_stop
        stop = max(stop, next_stop)
    yield start, stop
