"""A directory whose new files are in this host's memory until storage has them, too."""

import mmap
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import IO, Any

from typing_extensions import override

from lightning_scar.storage.directory import Directory, Place, Tier
from lightning_scar.storage.host_memory import has_memory, left_in_memory
from lightning_scar.storage.lease import run_of
from lightning_scar.storage.store import DeltaStore, names_in

#: How often in a row files may be merged away while they are copied.
_ATTEMPTS = 5


class Places(Directory):
    """The union of this host's memory and storage. A file's name is unique, so the nearest intact one is read.

    Without memory it is storage.

    Args:
        storage: The directory.
        memory: The folder in memory that belongs to it, if there is one.

    Attributes:
        storage: The directory.
        memory: The folder in memory.
        stored: The names of files that are known to be in storage.
        brought: Those that were copied there from memory at this start, and whether from this host's.
        stored_bytes: Bytes written to storage.
        trouble: Why a file went to storage instead of memory, if one did.
        is_short: Whether the last file did.

    Example::

        >>> import tempfile
        >>> both = Places(Directory("memory://storage-example"), Directory(tempfile.mkdtemp()))
        >>> both.write("rank-0000/a", [b"1"])
        >>> both.names("rank-0000"), both.storage.names("rank-0000"), both.tier("rank-0000/a").name
        (['a'], [], 'MEMORY')

    """

    def __init__(self, storage: Directory, memory: Directory | None = None) -> None:
        # For messages and the lease it is storage.
        vars(self).update(vars(storage))
        self.storage = storage
        self.memory = memory
        self.stored: set[str] = set()
        self.brought: Mapping[str, Tier] = {}
        self.stored_bytes = 0
        self.trouble: OSError | None = None
        self.is_short = False

    @override
    def file(self, name: str) -> str:
        return self._in_memory(name) or self.storage.file(name)

    @override
    def tier(self, name: str) -> Tier:
        return Tier.MEMORY if self._in_memory(name) else self.brought.get(name, Tier.STORAGE)

    def _in_memory(self, name: str) -> str | None:
        path = self.memory.file(name) if self.memory is not None else None
        return path if path is not None and os.path.exists(path) else None

    @override
    def further(self, name: str) -> Directory | None:
        return self.storage if self._in_memory(name) else None

    @override
    def names(self, folder: str = "") -> list[str]:
        in_memory = self.memory.names(folder) if self.memory is not None else []
        return sorted({*in_memory, *self.storage.names(folder)})

    @override
    def open(self, name: str, readahead: int | None = None) -> IO[bytes]:
        if self.memory is not None:
            with suppress(FileNotFoundError, NotADirectoryError):
                return self.memory.open(name, readahead)
        return self.storage.open(name, readahead)

    @override
    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    @override
    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write a file to memory, or to storage if memory does not take it.

        Args:
            name: Its name.
            pieces: Its bytes, which may be iterated twice.

        """
        if self.memory is not None:
            try:
                self.memory.write(name, pieces)
            except OSError as error:
                self.trouble, self.is_short = error, True
            else:
                self.is_short = False
                return
        self.storage.write(name, self._counted(pieces))

    def _counted(self, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        for piece in pieces:
            self.stored_bytes += len(piece)
            yield piece

    @override
    def delete(self, name: str) -> None:
        """Delete a file in the nearest place. Further places follow when they have its replacement."""
        (self.memory or self.storage).delete(name)

    @override
    def sweep(self, folder: str) -> None:
        for place in filter(None, (self.memory, self.storage)):
            place.sweep(folder)


def open_store(url: str | os.PathLike[str], storage_options: dict[str, Any] | None = None) -> DeltaStore:
    """Open a running checkpoint for reading: its directory, and what its run has in this host's memory.

    Args:
        url: The directory, any fsspec URL.
        storage_options: Passed to the file system.

    Example::

        >>> open_store("memory://no-run-here").is_empty()
        True

    """
    storage = Directory(url, storage_options)
    left = left_in_memory(storage, run_of(storage)) if has_memory() else None
    return DeltaStore(Places(storage, Directory(left) if left is not None else None))


class Copies:
    """Copies in a further place of the files that a nearer one has.

    Args:
        source: Where the files are.
        place: Where the copies go.
        folders: The folders that they are in.
        wanted: Returns the names of the files that should be there.
        only_own: Whether to keep other files there.

    Attributes:
        there: The names of the files that are there.

    """

    def __init__(
        self,
        source: Directory,
        place: Place,
        folders: Iterable[str],
        wanted: Callable[[], Collection[str]],
        only_own: bool = False,
    ) -> None:
        self._source = source
        self._place = place
        self._folders = list(folders)
        self._wanted = wanted
        self.there: set[str] = set()
        self.look()
        self._left_alone = self.there.difference(wanted()) if only_own else set()
        self.nbytes = 0

    def look(self) -> None:
        """List what is there, as somebody may have removed files.

        Raises:
            OSError: If the place cannot be read.

        """
        self.there = {name for folder in self._folders for name in names_in(self._place, folder)}

    def update(self) -> bool:
        """Copy what is not there, in the order in which it was written, then delete what is no longer wanted.

        Returns:
            Whether everything is there; ``False`` if a file has vanished that is still wanted. Nothing is deleted then.

        Raises:
            OSError: If the place cannot be written to.

        """
        for _ in range(_ATTEMPTS):
            wanted = set(self._wanted())
            found = [self._copy(name) for name in sorted(wanted - self.there, key=written_order)]
            if all(found):
                self.delete_unwanted()
                return True
            if wanted == set(self._wanted()):
                break
        return False

    def delete_unwanted(self) -> None:
        """Delete what is no longer wanted.

        Raises:
            OSError: If the place cannot be written to.

        """
        for name in self.there.difference(self._wanted(), self._left_alone):
            self._place.delete(name)
            self.there.discard(name)

    def _copy(self, name: str) -> bool:
        try:
            with self._source.open(name) as file:
                size = file.seek(0, os.SEEK_END)
                data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
        except (FileNotFoundError, NotADirectoryError):
            return False
        self._place.write(name, [memoryview(data)])
        self.there.add(name)
        self.nbytes += size
        return True


def written_order(name: str) -> tuple[str, str]:
    """Return the sort key of a rank's file names: incarnation and sequence.

    Example::

        >>> sorted(["rank-0000/merged-00001-00000003-0001", "rank-0000/delta-00001-00000002"], key=written_order)
        ['rank-0000/delta-00001-00000002', 'rank-0000/merged-00001-00000003-0001']

    """
    return name.rpartition("/")[2].partition("-")[2], name
