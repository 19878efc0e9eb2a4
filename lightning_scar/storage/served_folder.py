"""What callers from other hosts may do to a folder: look, read, put and delete below it, within a limit."""

import errno
import os
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO

from lightning_scar.storage.folder_protocol import FileInfo, NoRoomError
from lightning_scar.storage.room import bytes_in
from lightning_scar.storage.spare_file import SpareFile

_TEMPORARY = ".put.tmp"


class ServedFolder:
    """A folder whose callers know files by their names relative to it, and reach nothing else.

    Args:
        path: The folder. What puts that were cut off by a crash have left in it is removed.
        limit: How many bytes may lie in the folders of one name, which are those of one rank; ``None`` for any number.

    Example::

        >>> import tempfile
        >>> folder = ServedFolder(Path(tempfile.mkdtemp()), limit=100)
        >>> with folder.place("copies/a.bin", size=4) as descriptor:
        ...     _ = os.write(descriptor, b"1234")
        >>> folder.list("copies")
        [FileInfo(name='a.bin', size=4, is_folder=False)]

    """

    def __init__(self, path: Path, limit: int | None) -> None:
        self._root = Path(os.path.realpath(path))
        self._limit = limit
        self._put_to: set[Path] = set()
        self._was_read: set[Path] = set()
        self._spare = SpareFile()
        self._last_put = 0
        self._lock = threading.Lock()
        # Not rglob, which fails when another process removes a folder in between.
        for folder, _, names in os.walk(self._root):
            for name in names:
                if name.startswith(".") and name.endswith(_TEMPORARY):
                    Path(folder, name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        path = Path(os.path.realpath(self._root / name))
        asked = PurePosixPath(name)
        if asked.is_absolute() or ".." in asked.parts or not path.is_relative_to(self._root):
            raise PermissionError(errno.EACCES, "only what lies in the served folder can be reached")
        return path

    def _file(self, name: str) -> Path:
        path = self._path(name)
        if path == self._root:
            raise IsADirectoryError(errno.EISDIR, "this is the served folder itself, name a file in it")
        return path

    def list(self, name: str) -> Sequence[FileInfo]:
        """What lies in a folder now, without puts that are under way.

        Raises:
            OSError: If there is no such folder, or it may not be read.

        """
        return list(_visible(self._path(name)))

    def info(self, name: str) -> FileInfo:
        """What is known of a file or folder.

        Raises:
            OSError: If there is none, or it may not be looked at.

        """
        path = self._path(name)
        is_folder = path.is_dir()
        return FileInfo(name, 0 if is_folder else path.stat().st_size, is_folder)

    def open(self, name: str) -> IO[bytes]:
        """Opens a file for reading.

        Raises:
            OSError: If there is none, or it may not be read.

        """
        path = self._path(name)
        with self._lock:
            self._was_read.add(path)
        return open(path, "rb", buffering=0)

    def delete(self, name: str) -> None:
        """Deletes a file; one that is already gone is no error.

        Raises:
            OSError: If it may not be deleted.

        """
        path = self._file(name)
        with self._lock:
            # What was read may still be on its way to a caller: the system sends the pages of a file themselves.
            may_be_kept = path.parent in self._put_to and path not in self._was_read
            self._was_read.discard(path)
            self._spare.delete(path, _hidden(path), at_most=self._last_put if may_be_kept else 0)
            if path.parent in self._put_to and not any(_visible(path.parent)):
                # With the last copy goes what was kept for more of them.
                self._spare.drop()

    def close(self) -> None:
        """Gives back what is kept for puts to come."""
        with self._lock:
            self._spare.drop()

    @contextmanager
    def place(self, name: str, size: int) -> Iterator[int]:
        """Takes a file of so many bytes: readers see all of it, or nothing if the body fails.

        Yields:
            A descriptor to write it to.

        Raises:
            NoRoomError: If that exceeds the limit.
            OSError: If there can be no such file.

        """
        path = self._file(name)
        self._make(path.parent)
        # Under a name of its own: two callers may put the same file.
        temporary = _hidden(path)
        descriptor: int | None = None
        try:
            with self._lock:
                is_new = not self._spare.take(temporary)
                descriptor = os.open(temporary, os.O_WRONLY | (os.O_CREAT | os.O_EXCL if is_new else 0), 0o600)
                self._reserve(path.parent, descriptor, size)
            yield descriptor
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _make(self, folder: Path) -> None:
        # One by one, since the mode that ``makedirs`` takes is the last one's only.
        for parent in (*reversed(folder.parents), folder):
            if parent.is_relative_to(self._root):
                parent.mkdir(0o700, exist_ok=True)

    def _reserve(self, folder: Path, descriptor: int, size: int) -> None:
        self._put_to.add(folder)
        if self._limit is not None:
            self._check_room(folder, size, os.fstat(descriptor).st_size, self._limit)
        # From here on the whole file counts, for the next caller too.
        os.ftruncate(descriptor, size)
        self._last_put = size

    def _check_room(self, folder: Path, size: int, own: int, limit: int) -> None:
        # Looked up each time: files are also deleted by others than the callers.
        taken = bytes_in(self._root, folder.name) - own
        if taken + size > limit:
            reason = f"no room for {size} bytes, this rank has taken {taken} of {limit} there: raise memory_limit"
            raise NoRoomError(errno.ENOSPC, reason)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{uuid.uuid4().hex}{_TEMPORARY}")


def _visible(folder: Path) -> Iterator[FileInfo]:
    return (found for found in _entries(folder) if not found.name.endswith(_TEMPORARY))


def _entries(folder: Path) -> Iterator[FileInfo]:
    with os.scandir(folder) as entries:
        for entry in entries:
            # One that is deleted meanwhile is none.
            with suppress(FileNotFoundError):
                is_folder = entry.is_dir(follow_symlinks=False)
                size = 0 if is_folder else entry.stat(follow_symlinks=False).st_size
                yield FileInfo(entry.name, size, is_folder)
