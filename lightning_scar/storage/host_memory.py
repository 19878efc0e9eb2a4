"""This host's memory: folders that outlive the processes that write to them, one for each start of a run.

A folder belongs to the start whose lease has its token. The next start of the run finds the token in the lease that the
dead one left, keeps it in its own until it has saved everything anew, and goes on from the folder; a directory that was
begun anew names another token, so that nobody takes what is not its own for fresh.
"""

import fcntl
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import glob
from itertools import count
from pathlib import Path

from lightning_scar.storage.directory import Directory
from lightning_scar.storage.lease import tokens_of
from lightning_scar.storage.mounts import place_of
from lightning_scar.storage.room import bytes_in
from lightning_scar.storage.store import retry_vanished

#: Where users may say which folder is in memory.
VARIABLE = "LIGHTNING_SCAR_MEMORY"
_MEMORY = Path("/dev/shm")
#: Not what supervisors sweep.
_PREFIX = "scar-memory-"
#: How long what a dead run left stays for its next start, if another run of the user starts here.
_KEPT_SECONDS = 24 * 3600.0


class HostMemory:
    """The folder of one start of a run on this host, held by a lock as long as one of its processes lives.

    Folders are the user's alone. What dead starts of the same run left is removed, but for those that this one goes on
    from, and so is what other dead runs of the user have not touched for a day.

    Args:
        directory: The directory of the run.
        token: That of this start's lease.
        previous: Those of the starts before that it follows, the newest first.

    Raises:
        OSError: If there is no folder in memory.

    """

    def __init__(self, directory: Directory, token: str, previous: Sequence[str] = ()) -> None:
        self.path = _user_folder() / _name(directory) / token
        self._locks: dict[Path, int] = {}
        self._hold()
        for folder in left_in_memory(directory, previous):
            # Lest another run's start takes it for forgotten, as it just may have.
            with suppress(FileNotFoundError):
                self._locks[folder] = _locked(folder)
        #: The folders of dead starts that this one goes on from, the newest first.
        self.inherited = [folder for folder in self._locks if folder != self.path]
        _sweep(self.path.parent, {self.path, *self.inherited})

    def _hold(self) -> None:
        # Whoever ends at the same time removes what is empty.
        self._locks[self.path] = retry_vanished(self._made_and_locked)

    def _made_and_locked(self) -> int:
        for folder in (self.path.parents[1], self.path.parent, self.path):
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
        if not _is_private(self.path.parents[1]):
            raise PermissionError(f"{self.path.parents[1]} is not this user's alone any more")
        return _locked(self.path)

    def renew(self) -> None:
        """Makes the folder once more if somebody has removed it.

        Raises:
            OSError: If it cannot be made.

        """
        lock = self._locks[self.path]
        if not _is_at(self.path, lock):
            self._hold()
            _let_go(lock)

    @property
    def device(self) -> int:
        """The number of the file system, which tells the memories of containers apart that have the same names."""
        return os.fstat(self._locks[self.path]).st_dev

    def inherited_bytes(self, folder: str | None = None) -> int:
        """Bytes of all files that dead starts left.

        Args:
            folder: Counts those of one rank only, by the name of its folder.

        """
        return sum(bytes_in(inherited, folder) for inherited in self.inherited)

    @property
    def room(self) -> int:
        """Bytes that all processes of this start may have here: what is free, and what they have already."""
        # Whatever has become of the folder by now, the lock is open.
        status = os.fstatvfs(self._locks[self.path])
        return status.f_frsize * status.f_bavail + bytes_in(self.path)

    def forget_inherited(self, folders: Sequence[Path], remove: bool) -> None:
        """Lets go of what dead starts left, when nobody needs it any more.

        Args:
            folders: Which of it.
            remove: Whether to remove it, as one process of a host does.

        """
        for folder in folders:
            _let_go(self._locks.pop(folder))
            if remove:
                shutil.rmtree(folder, ignore_errors=True)
        self.inherited = [folder for folder in self.inherited if folder not in folders]

    def leave(self) -> None:
        """Lets go of all folders; what is in them stays."""
        while self._locks:
            _let_go(self._locks.popitem()[1])
        with suppress(OSError), _unless_held(self.path):
            # If nothing was ever saved.
            self.path.rmdir()
            self.path.parent.rmdir()

    def remove(self, folder: str, is_needed: Callable[[str], bool]) -> None:
        """Removes what this process wrote, and everything when nobody else is left.

        Args:
            folder: The folder of this process in it.
            is_needed: Whether what is in another one has to wait for the next start.

        """
        shutil.rmtree(self.path / folder, ignore_errors=True)
        self.leave()
        with suppress(OSError):
            if not any(is_needed(path.parent.name) for path in _paths(self.path, "rank-*/*")):
                _remove_unless_held(self.path)
            self.path.parent.rmdir()


def left_in_memory(directory: Directory, tokens: Sequence[str] | None = None) -> list[Path]:
    """The folders on this host that some starts of a run have written to, the newest first.

    Args:
        directory: The directory of the run.
        tokens: Those of the starts; by default of the newest one and those that it follows.

    """
    runs = [run for user in _user_folders() if (run := user / _name(directory)).is_dir()]
    # Most hosts have none, and need not ask for the lease.
    tokens = tokens_of(directory) if tokens is None and runs else tokens or ()
    return [run / token for token in tokens for run in runs if (run / token).is_dir()]


def _memory() -> Path:
    memory = Path(os.environ.get(VARIABLE) or _MEMORY)
    if not memory.is_absolute():
        # It would be another one after a chdir.
        raise ValueError(f"{VARIABLE}={str(memory)!r} must be an absolute path, e.g. {str(memory.absolute())!r}")
    return memory


def _user_folders() -> list[Path]:
    """This user's folders, the first of which is written to; more than one only where a name was taken for a while."""
    return sorted(path for path in _memory().glob(f"{_PREFIX}{os.getuid()}*") if _is_private(path))


def _user_folder() -> Path:
    if found := _user_folders():
        return found[0]
    parent = _memory()
    try:
        # Everybody can write to /dev/shm, and take a name there; but nobody can take all of them.
        return next(folder for number in count() if (folder := _private_folder(parent, number)))
    except OSError as error:
        raise FileNotFoundError(
            f"memory=True needs a folder in memory, and {parent} is none that can be written to ({error.strerror}). "
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
    place = place_of(directory.path) if directory.is_local else directory.fs.unstrip_protocol(directory.path)
    return hashlib.sha256(os.fsencode(place)).hexdigest()[:16]


def _sweep(run: Path, needed: set[Path]) -> None:
    for folder in {path for user in _user_folders() for path in _paths(user, "*/*")} - needed:
        # Another process may be at it, too.
        with suppress(OSError):
            if folder.parent.name == run.name or time.time() - _last_touched(folder) > _KEPT_SECONDS:
                _remove_unless_held(folder)
                folder.parent.rmdir()


def _paths(folder: Path, pattern: str) -> list[Path]:
    # Path.glob fails when another process removes a folder in between.
    return [folder / name for name in glob(pattern, root_dir=folder)]


def _last_touched(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))


def _locked(folder: Path) -> int:
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    if not _is_at(folder, lock):
        # Whoever removed it held the lock until then.
        os.close(lock)
        raise FileNotFoundError(folder)
    return lock


def _let_go(lock: int) -> None:
    # A child process that was forked has it, too, and would keep it.
    fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


def _is_at(folder: Path, descriptor: int) -> bool:
    """Whether an open folder is still there."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    return False


def _remove_unless_held(folder: Path) -> None:
    with _unless_held(folder):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _unless_held(folder: Path) -> Iterator[None]:
    """Keeps everybody else from holding a folder meanwhile.

    Raises:
        OSError: If somebody does, or it is gone.

    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(folder, lock):
            raise FileNotFoundError(folder)
        yield
    finally:
        os.close(lock)
