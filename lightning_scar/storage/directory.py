"""A folder on any fsspec file system: durable atomic writes, uncached listings, reads into given memory."""

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Protocol, cast

from fsspec.core import url_to_fs
from fsspec.dircache import DirCache
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from lightning_scar.storage.locks import IS_POSIX, lock_alone, unlock
from lightning_scar.storage.source import Source

_TEMPORARY = ".tmp"
#: Pieces smaller than this are buffered before they are written.
_BUFFER = 1 << 18
#: Bytes per write to a remote file, which buffers in memory until it has enough for one part of an upload.
_SLICE = 1 << 23


def _is_locked(descriptor: int) -> bool:
    """Return whether the lock is taken, or the file system has none."""
    try:
        lock_alone(descriptor)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


#: The packages through which the file systems for S3, Google, Azure, HTTP and others reach a server. Most of their
#: errors are not ``OSError``.
_CLIENTS = {
    "adlfs",
    "aiobotocore",
    "aiohttp",
    "asyncio",
    "azure",
    "boto3",
    "botocore",
    "concurrent",
    "fsspec",
    "gcsfs",
    "google",
    "httpx",
    "msal",
    "paramiko",
    "requests",
    "s3fs",
    "urllib3",
}


def _is_of_store(error: Exception) -> bool:
    # A read-only file system raises NotImplementedError on a write.
    is_of_client = any(kind.__module__.partition(".")[0] in _CLIENTS for kind in type(error).__mro__)
    return is_of_client or isinstance(error, NotImplementedError)


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Convert object stores' own exceptions to ``OSError``; leave programming errors as they are."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if not _is_of_store(error):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def _file_system(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """Return an instance that users do not share, as they may want cached listings; it is reused, as making is slow."""
    try:
        return url_to_fs(url, **{**options, "use_listings_cache": False})  # type: ignore[no-any-return]
    except TypeError:
        return url_to_fs(url, **options, skip_instance_cache=True)  # type: ignore[no-any-return]


class Tier(IntEnum):
    """Where a file is, the nearest place first."""

    MEMORY = 0
    NEIGHBOUR = 1
    STORAGE = 2


class Place(Protocol):
    """Where files of ranks may be: host memory, the memory of another host, storage."""

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder."""

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write a file."""

    def delete(self, name: str) -> None:
        """Delete a file."""


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

    def __init__(
        self,
        url: str | os.PathLike[str],
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self.url = os.fspath(url)
        self.fs, path = _file_system(self.url, storage_options or {})
        # A cached listing hides what other processes and threads have written or deleted since.
        self.fs.dircache = DirCache(use_listings_cache=False)
        self.path = str(path).rstrip("/")
        #: Whether the file system is local.
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def __str__(self) -> str:
        return self.url

    def file(self, name: str) -> str:
        """Return the full path of the file ``name``."""
        return f"{self.path}/{name}"

    def tier(self, name: str) -> Tier:
        """Return where the file ``name`` is."""
        return Tier.STORAGE

    def further(self, name: str) -> "Directory | None":
        """Return the next place of the file ``name``, for a reader that found it damaged here."""
        return None

    @_as_os_errors()
    def names(self, folder: str = "") -> list[str]:
        """Return the names in this folder, or in a subfolder, sorted; empty if there is no such folder."""
        path = self.file(folder) if folder else self.path
        try:
            found = self.fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except KeyError:
            # MemoryFileSystem fails when a file is deleted during the listing.
            return self.names(folder)
        names = (str(found).rstrip("/").rsplit("/", 1)[-1] for found in found if str(found).rstrip("/") != path)
        return sorted(name for name in names if not name.endswith(_TEMPORARY))

    def bytes_in(self, folder: str) -> int:
        """Return the total size of the files in a folder."""
        found = 0
        for name in self.names(folder):
            with suppress(FileNotFoundError), _as_os_errors():
                found += self.fs.size(self.file(f"{folder}/{name}"))
        return found

    @_as_os_errors()
    def exists(self) -> bool:
        """Return whether the folder exists; on an object store, whether it holds anything."""
        return bool(self.fs.exists(self.path))

    @_as_os_errors()
    def create(self) -> None:
        """Create the folder and its parents, if the file system has folders.

        Raises:
            OSError: If the folder cannot be created or written to.

        """
        self.fs.makedirs(self.path, exist_ok=True)
        if self.is_local and not os.access(self.path, os.W_OK | os.X_OK):
            raise PermissionError(f"{self.path} is not writable")

    @contextmanager
    def alone(self, patience: float) -> Iterator[None]:
        """Exclude other processes of this host from the same ``with`` block, if the file system has locks.

        Args:
            patience: Seconds to wait for the lock before going on without it, as users may lock folders, too.

        """
        if not (self.is_local and IS_POSIX):
            yield
            return
        lock = os.open(self.path, os.O_RDONLY)
        try:
            deadline = time.monotonic() + patience
            while not _is_locked(lock) and time.monotonic() < deadline:
                time.sleep(0.01)
            yield
        finally:
            unlock(lock)
            os.close(lock)

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write a file atomically and durably: readers see all of it or none, and a later power cut loses nothing.

        Args:
            name: The file's name in this folder, or in a subfolder, which is created if necessary.
            pieces: What to write, in order.

        Raises:
            OSError: If the file cannot be written; nothing is left under ``name`` then.

        """
        if "/" in name:
            with _as_os_errors():
                self.fs.makedirs(self.file(name).rpartition("/")[0], exist_ok=True)
        if self.is_local:
            self._write_local(Path(self.file(name)), pieces)
        elif isinstance(self.fs, MemoryFileSystem):
            # Readers would see a file that is still open for writing.
            self.fs.pipe_file(self.file(name), b"".join(pieces))
        else:
            self._write_remote(self.file(name), pieces)

    def _write_remote(self, path: str, pieces: Iterable[bytes | memoryview]) -> None:
        # Object stores show an object only when it is complete, even if it is uploaded in parts.
        with _as_os_errors():
            file = self.fs.open(path, "wb")
            try:
                for piece in pieces:
                    for start in range(0, len(piece), _SLICE):
                        file.write(piece[start : start + _SLICE])
                file.close()
            except BaseException:
                # Closing it, as its finalizer does too, would complete the object with partial data.
                with suppress(AttributeError):
                    file.closed = True
                with suppress(Exception):
                    file.discard()
                raise

    def _write_local(self, path: Path, pieces: Iterable[bytes | memoryview]) -> None:
        # Beside the final name: a rename is atomic within one file system only, and $TMPDIR may be another.
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{_TEMPORARY}")
        try:
            with open(temporary, "wb", buffering=_BUFFER) as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        if not IS_POSIX:
            return
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @_as_os_errors()
    def open(self, name: str, readahead: int | None = None) -> IO[bytes]:
        """Open a file for reading.

        Args:
            name: The file's name.
            readahead: Bytes that a remote file system may fetch beyond those requested; its own default is often many
                megabytes.

        Raises:
            FileNotFoundError: If there is no such file.

        """
        if self.is_local:
            return open(self.file(name), "rb", buffering=0)
        if isinstance(self.fs, MemoryFileSystem):
            # It has one file object per file, so readers would share its position.
            return BytesIO(self.read(name))
        return cast(IO[bytes], self.fs.open(self.file(name), "rb", block_size=readahead))

    def source(self, name: str) -> Source:
        """Open a file for reading entries.

        Raises:
            FileNotFoundError: If there is no such file.

        """
        return Source(self.open(name))

    @_as_os_errors()
    def read(self, name: str) -> bytes:
        """Return all bytes of a small file.

        Raises:
            FileNotFoundError: If there is no such file.

        """
        return bytes(self.fs.cat_file(self.file(name)))

    @_as_os_errors()
    def delete(self, name: str) -> None:
        """Delete a file; one that is already gone is no error."""
        with suppress(FileNotFoundError, NotADirectoryError):
            self.fs.rm_file(self.file(name))

    def sweep(self, folder: str) -> None:
        """Delete the temporary files that a crash left in a folder. Only the folder's writer may call this."""
        if self.is_local:
            for path in Path(self.file(folder)).glob(f".*{_TEMPORARY}"):
                with suppress(OSError):
                    path.unlink()
