"""Where entries are read from: one open file of any file system."""

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import IO

#: Spans no further apart than this are fetched as one.
_GAP = 64 * 1024


class Source(AbstractContextManager["Source"]):
    """Bytes of one delta, read into ready memory.

    Args:
        file: The open file; closed at the end.

    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def expect(self, spans: Iterable[tuple[int, int]]) -> None:
        """Says what will be read, in order of its place: a local file is fetched ahead from there, and nowhere else.

        Most of an old delta may be dead. Other file systems read ahead as they see fit.
        """
        if isinstance(self._file, io.FileIO) and hasattr(os, "posix_fadvise"):
            for start, stop in _joined(spans):
                os.posix_fadvise(self._file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)

    def read_into(self, start: int, into: memoryview) -> bool:
        """Fills ``into`` with the bytes from ``start`` on; ``False`` where the file ends too early."""
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
