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
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from lightning_scar.storage.directory import Directory
from lightning_scar.storage.lease import tokens_of

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
        OSError: If there is no folder in memory, or somebody else can write to it.

    """

    def __init__(self, directory: Directory, token: str, previous: Sequence[str] = ()) -> None:
        run = _user_folder() / _name(directory)
        run.mkdir(mode=0o700, exist_ok=True)
        self.path = run / token
        self.path.mkdir(mode=0o700, exist_ok=True)
        self._lock: int | None = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        #: The folders of dead starts that this one goes on from, the newest first.
        self.inherited = _existing(run, previous)
        _sweep(run, {self.path, *self.inherited})

    def forget_inherited(self, remove: bool) -> None:
        """Lets go of what dead starts left, when nobody needs it any more.

        Args:
            remove: Whether to remove it, as one process of a host does.

        """
        for folder in self.inherited if remove else ():
            shutil.rmtree(folder, ignore_errors=True)
        self.inherited = []

    def leave(self) -> None:
        """Lets go of the folder; what is in it stays."""
        if self._lock is not None:
            # A child process that was forked has it, too, and would keep it.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = None

    def remove(self, folder: str, is_needed: Callable[[str], bool]) -> None:
        """Removes what this process wrote, and everything when nobody else is left.

        Args:
            folder: The folder of this process in it.
            is_needed: Whether what is in another one has to wait for the next start.

        """
        shutil.rmtree(self.path / folder, ignore_errors=True)
        self.leave()
        with suppress(OSError):
            if not any(is_needed(path.parent.name) for path in self.path.glob("rank-*/*")):
                _remove_unless_held(self.path)
            self.path.parent.rmdir()


def left_in_memory(directory: Directory, tokens: Sequence[str] | None = None) -> list[Path]:
    """The folders on this host that some starts of a run have written to, the newest first.

    Args:
        directory: The directory of the run.
        tokens: Those of the starts; by default of the newest one and those that it follows.

    """
    user = _folder()
    # Most hosts have none, and need not ask for the lease.
    if user is None or not (user / _name(directory)).is_dir() or not _is_private(user):
        return []
    return _existing(user / _name(directory), tokens_of(directory) if tokens is None else tokens)


def _folder() -> Path | None:
    chosen = os.environ.get(VARIABLE)
    parent = Path(chosen) if chosen else _MEMORY
    return parent / f"{_PREFIX}{os.getuid()}" if os.access(parent, os.W_OK) else None


def _user_folder() -> Path:
    folder = _folder()
    if folder is None:
        raise FileNotFoundError(
            f"memory=True needs a folder in memory, and {os.environ.get(VARIABLE) or _MEMORY} is none that can be "
            f"written to. Set {VARIABLE} to a tmpfs folder, or leave memory out."
        )
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not _is_private(folder):
        raise PermissionError(f"{folder} is not this user's alone; remove it, or set {VARIABLE} to another folder")
    return folder


def _is_private(folder: Path) -> bool:
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _name(directory: Directory) -> str:
    url: str = directory.fs.unstrip_protocol(directory.path)
    return hashlib.sha256(url.encode()).hexdigest()[:16]


def _existing(run: Path, tokens: Iterable[str]) -> list[Path]:
    return [run / token for token in tokens if (run / token).is_dir()]


def _sweep(run: Path, needed: set[Path]) -> None:
    for folder in set(run.parent.glob("*/*")) - needed:
        # Another process may be at it, too.
        with suppress(OSError):
            if folder.parent == run or time.time() - _last_touched(folder) > _KEPT_SECONDS:
                _remove_unless_held(folder)
                folder.parent.rmdir()


def _last_touched(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))


def _remove_unless_held(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
