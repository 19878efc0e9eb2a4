"""Locks on folders, between processes of one host, where the operating system has such locks."""

from contextlib import suppress
from importlib.util import find_spec

if find_spec("fcntl") is not None:
    import fcntl

#: Whether folders can be opened, locked and flushed: everywhere except on Windows.
IS_POSIX = find_spec("fcntl") is not None


def lock_shared(descriptor: int) -> None:
    """Take a shared lock on an open folder; wait while another process has it exclusively."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)


def lock_alone(descriptor: int) -> None:
    """Take an exclusive lock on an open folder.

    Raises:
        BlockingIOError: If another process has locked it.
        OSError: If the file system has no locks.

    """
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def unlock(descriptor: int) -> None:
    """Release a lock. Closing is not enough: a child process that was forked meanwhile has it, too."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
