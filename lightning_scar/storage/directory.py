"""A folder on any fsspec file system: durable atomic writes, fresh listings, reads into ready memory."""

import os
from collections.abc import Iterable
from contextlib import suppress
from copy import copy
from io import BytesIO
from pathlib import Path
from typing import IO, Any, cast

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from lightning_scar.storage.source import MappedSource, Source, StreamSource

_TEMPORARY = ".tmp"


class Directory:
    """A folder of small immutable files on an fsspec file system.

    Args:
        url: Any fsspec URL or local path, e.g. ``"runs/a/scar"``, ``"memory://a"`` or ``"s3://bucket/a"``.
        storage_options: Passed to the file system, e.g. ``{"anon": True}``.

    Example::

        >>> folder = Directory("memory://directory-example")
        >>> folder.write("a.bin", [b"12", b"34"])
        >>> folder.names(), folder.read("a.bin")
        (['a.bin'], b'1234')

    """

    def __init__(self, url: str | os.PathLike[str], storage_options: dict[str, Any] | None = None) -> None:
        self.url = os.fspath(url)
        self.fs, path = url_to_fs(self.url, **(storage_options or {}))
        self.path = str(path).rstrip("/")
        self._local = isinstance(self.fs, LocalFileSystem)

    def __str__(self) -> str:
        return self.url

    def child(self, name: str) -> "Directory":
        """The folder ``name`` below this one (which need not exist)."""
        # Not by the URL: a relative one would lead elsewhere once the process has changed its working directory.
        child = copy(self)
        child.url, child.path = f"{self.url.rstrip('/')}/{name}", self.file(name)
        return child

    def file(self, name: str) -> str:
        """The full path of the file ``name``, for messages and for the file system."""
        return f"{self.path}/{name}"

    def names(self) -> list[str]:
        """What the folder holds now, sorted; empty when there is no such folder."""
        # Object stores cache listings; a file that another process just wrote must be seen.
        self.fs.invalidate_cache(self.path)
        try:
            found = self.fs.ls(self.path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (str(path).rstrip("/").rsplit("/", 1)[-1] for path in found if str(path).rstrip("/") != self.path)
        return sorted(name for name in names if not name.endswith(_TEMPORARY))

    def create(self) -> None:
        """Makes the folder and its parents, where the file system has folders.

        Raises:
            OSError: If the folder cannot be made or written to.

        """
        self.fs.makedirs(self.path, exist_ok=True)
        if self._local and not os.access(self.path, os.W_OK | os.X_OK):
            raise PermissionError(f"{self.path} is not writable")

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Writes a file so that a reader sees all of it or none, and a power cut after the return loses nothing.

        Args:
            name: The file's name in this folder.
            pieces: What to write, in order.

        Raises:
            OSError: If the file cannot be written; nothing is left under ``name`` then.

        """
        if self._local:
            self._write_local(Path(self.file(name)), pieces)
        else:
            # One put: object stores show an object whole or not at all.
            self.fs.pipe_file(self.file(name), b"".join(pieces))

    def _write_local(self, path: Path, pieces: Iterable[bytes | memoryview]) -> None:
        # Beside the final name: a rename is atomic within one file system only, and $TMPDIR may be another.
        temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
        try:
            with open(temporary, "wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def open(self, name: str) -> IO[bytes]:
        """Opens a file for reading.

        Raises:
            FileNotFoundError: If there is no such file.

        """
        if self._local:
            return open(self.file(name), "rb", buffering=0)
        if isinstance(self.fs, MemoryFileSystem):
            # It has one file object a file, whose position all its readers would share.
            return BytesIO(self.read(name))
        return cast(IO[bytes], self.fs.open(self.file(name), "rb"))

    def source(self, name: str, start: int, stop: int) -> Source:
        """Opens a stretch of a file for reading entries.

        Raises:
            FileNotFoundError: If there is no such file.

        """
        if self._local:
            with suppress(OSError, ValueError, AttributeError):
                return MappedSource(self.file(name), start, stop)
        return StreamSource(self.open(name))

    def read(self, name: str) -> bytes:
        """All bytes of a small file.

        Raises:
            FileNotFoundError: If there is no such file.

        """
        return bytes(self.fs.cat_file(self.file(name)))

    def delete(self, name: str) -> None:
        """Deletes a file; one that is already gone is no error."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.file(name))

    def sweep(self) -> None:
        """Deletes what writes cut short by a crash left behind. Only the folder's one writer may call it."""
        if self._local and os.path.isdir(self.path):
            for path in Path(self.path).glob(f".*{_TEMPORARY}"):
                with suppress(OSError):
                    path.unlink()
