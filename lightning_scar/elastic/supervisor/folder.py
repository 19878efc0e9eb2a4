"""A folder in memory where workers save their state when all of them are started again, and one on disk."""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path

from lightning_scar.elastic.worker.state_folder import DISK

_MEMORY = Path("/dev/shm")
_PREFIX = "lightning-scar-"


class MemoryFolder:
    """A new folder, removed when closed. The next owner removes those of owners that were killed.

    The owner holds a lock on it, which the system releases however the owner ends. In it a link leads to a folder on
    disk, for what memory has no room for, or is kept for long.

    Args:
        parent: Where it is created; by default in memory, if possible.

    """

    def __init__(self, parent: Path | None = None) -> None:
        on_disk = Path(tempfile.gettempdir())
        if parent is None:
            parent = _MEMORY if os.access(_MEMORY, os.W_OK) else on_disk
        disk, lock = _made(on_disk)
        self._locks = {disk: lock}
        try:
            self.path, lock = _made(parent)
            (self.path / DISK).symlink_to(disk)
            self._locks[self.path] = lock
        except OSError:
            # Even for that memory has no room.
            self.path = disk

    def close(self) -> None:
        """Remove it, and what is left of owners that were killed just before this one started."""
        for path, lock in self._locks.items():
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
            _sweep(path.parent)


def _made(parent: Path) -> tuple[Path, int]:
    _sweep(parent)
    return next(found for _ in count() if (found := _made_and_locked(parent)))


def _made_and_locked(parent: Path) -> tuple[Path, int] | None:
    path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    with suppress(FileNotFoundError):
        lock = os.open(path, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path, lock
        # Before it was locked another owner removed it as a dead one's.
        os.close(lock)
    return None


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        # It is another user's, or was just removed by another supervisor.
        with suppress(OSError):
            _remove_unless_held(folder)


def _remove_unless_held(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
