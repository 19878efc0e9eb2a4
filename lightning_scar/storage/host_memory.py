"""This host's memory: the folder of a run on tmpfs, which outlives the processes that write to it.

The folder belongs to a directory and to the run that its lease names. A directory that was begun anew names another
run, so files of an old run are never taken for new ones.
"""

import hashlib
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import glob
from itertools import count
from pathlib import Path

from typing_extensions import override

from lightning_scar.storage.directory import Directory
from lightning_scar.storage.locks import IS_POSIX, lock_alone, lock_shared, unlock
from lightning_scar.storage.store import retry_vanished

#: The environment variable that names a folder in memory.
VARIABLE = "LIGHTNING_SCAR_MEMORY"
_MEMORY = Path("/dev/shm")
#: Not what supervisors sweep.
_PREFIX = "scar-memory-"
#: How long a dead run's files are kept for its next start when another run of the user starts here.
_KEPT_SECONDS = 24 * 3600.0


class LimitError(OSError):
    """A file would exceed ``memory_limit``."""


class HostMemory(Directory):
    """The folder of a run on this host, as one rank writes to it, held by a lock as long as one of its processes lives.

    Only the user can access it. Making one removes what other runs have left in memory: earlier runs of the same
    directory, and runs that nobody has touched for a day.

    Args:
        directory: The directory of the run.
        run: The run's name in its lease.
        limit: Bytes that the rank may take; ``None`` for no limit.

    Attributes:
        folder: The folder.

    Raises:
        OSError: If there is no folder in memory.

    """

    def __init__(self, directory: Directory, run: str, limit: int | None = None) -> None:
        self.folder = _user_folder() / _name(directory) / _digest(run)
        super().__init__(self.folder)
        self.limit = limit
        self._lock = retry_vanished(self._made_and_locked)
        os.utime(self.folder)
        _sweep(self.folder)

    def _made_and_locked(self) -> int:
        # A process that ends at the same time removes empty folders.
        for folder in (self.folder.parents[1], self.folder.parent, self.folder):
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
        if not _is_private(self.folder.parents[1]):
            raise PermissionError(f"{self.folder.parents[1]} is no longer this user's alone")
        return _locked(self.folder)

    def renew(self) -> None:
        """Make the folder once more if somebody has removed it.

        Raises:
            OSError: If it cannot be made.

        """
        if not _is_at(self.folder, self._lock):
            lost, self._lock = self._lock, retry_vanished(self._made_and_locked)
            _let_go(lost)

    @override
    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write a file.

        Raises:
            LimitError: If the rank would exceed its limit.
            OSError: If the file cannot be written.

        """
        self.renew()
        super().write(name, pieces if self.limit is None else self._within(self.limit, name, pieces))

    def _within(self, limit: int, name: str, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        nbytes = self.bytes_in(name.partition("/")[0])
        for piece in pieces:
            nbytes += len(piece)
            if nbytes > limit:
                raise LimitError(f"this file would exceed memory_limit={limit} bytes")
            yield piece

    @property
    def name(self) -> str:
        """A name that differs from those of other hosts, and of containers with the same host name."""
        return f"{socket.gethostname()}-{os.fstat(self._lock).st_dev}:{self.folder}"

    @property
    def free_bytes(self) -> int:
        """Bytes that are free there."""
        # Somebody may have removed the folder.
        place = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        status = os.statvfs(place)
        return status.f_frsize * status.f_bavail

    def leave(self) -> None:
        """Release the folder. What is in it stays; an empty one is removed."""
        _let_go(self._lock)
        for folder in _paths(self.folder, "rank-*"):
            with suppress(OSError):
                folder.rmdir()
        with suppress(OSError), _unless_held(self.folder):
            self.folder.rmdir()
            self.folder.parent.rmdir()


def has_memory() -> bool:
    """Return whether this user has anything in this host's memory."""
    return bool(_user_folders())


def left_in_memory(directory: Directory, run: str | None) -> Path | None:
    """Return the folder that a run has on this host, if there is one.

    Args:
        directory: The directory of the run.
        run: The run's name in its lease.

    """
    if run is None:
        return None
    found = (user / _name(directory) / _digest(run) for user in _user_folders())
    return next((path for path in found if path.is_dir()), None)


def _memory() -> Path:
    memory = Path(os.environ.get(VARIABLE) or _MEMORY)
    if not memory.is_absolute():
        # It would be another one after a chdir.
        raise ValueError(f"{VARIABLE}={str(memory)!r} must be an absolute path, e.g. {str(memory.absolute())!r}")
    return memory


def _user_folders() -> list[Path]:
    """Return this user's folders, the first of which is written to. There are several only if a name was taken."""
    if not IS_POSIX:
        return []
    return sorted(path for path in _memory().glob(f"{_PREFIX}{os.getuid()}*") if _is_private(path))


def _user_folder() -> Path:
    if not IS_POSIX:
        raise OSError("memory=True needs Linux or macOS; leave memory out")
    if found := _user_folders():
        return found[0]
    parent = _memory()
    try:
        # Anybody can take a name in /dev/shm, but nobody can take all of them.
        return next(folder for number in count() if (folder := _private_folder(parent, number)))
    except OSError as error:
        raise FileNotFoundError(
            f"memory=True needs a folder in memory, and {parent} cannot be written to ({error.strerror}). "
            f"Set {VARIABLE} to a tmpfs folder, or leave memory out."
        ) from error


def _private_folder(parent: Path, number: int) -> Path | None:
    folder = parent / f"{_PREFIX}{os.getuid()}{f'-{number}' if number else ''}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    return folder if _is_private(folder) else None


def _is_private(folder: Path) -> bool:
    with suppress(FileNotFoundError):
        status = folder.lstat()
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return False


def _name(directory: Directory) -> str:
    is_local, path = directory.is_local, directory.path
    return _digest(os.path.realpath(path) if is_local else directory.fs.unstrip_protocol(path))


def _digest(text: str) -> str:
    # Somebody else may have written the lease: never use its contents as a path.
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]


def _sweep(own: Path) -> None:
    for folder in {path for user in _user_folders() for path in _paths(user, "*/*")} - {own}:
        # Another process may remove it at the same time.
        with suppress(OSError):
            if folder.parent.name == own.parent.name or time.time() - _last_touched(folder) > _KEPT_SECONDS:
                with _unless_held(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                folder.parent.rmdir()


def _paths(folder: Path, pattern: str) -> list[Path]:
    # Path.glob fails when another process removes a folder in between.
    return [folder / name for name in glob(pattern, root_dir=folder)]


def _last_touched(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))


def _locked(folder: Path) -> int:
    lock = os.open(folder, os.O_RDONLY)
    lock_shared(lock)
    if not _is_at(folder, lock):
        # The process that removed it held the lock until then.
        os.close(lock)
        raise FileNotFoundError(folder)
    return lock


def _let_go(lock: int) -> None:
    unlock(lock)
    os.close(lock)


def _is_at(folder: Path, descriptor: int) -> bool:
    """Return whether an open folder is still there."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    return False


@contextmanager
def _unless_held(folder: Path) -> Iterator[None]:
    """Prevent others from holding a folder within the block.

    Raises:
        OSError: If somebody holds it, or it is gone.

    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        lock_alone(lock)
        if not _is_at(folder, lock):
            raise FileNotFoundError(folder)
        yield
    finally:
        os.close(lock)
