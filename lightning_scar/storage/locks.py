"""Locks on folders, between processes of one host, where the operating system has such locks."""

from contextlib import suppress
from importlib.util import find_spec

if find_spec("fcntl") is not None:
    import fcntl

#: Whether folders can be opened, locked and flushed: everywhere but on Windows.
IS_POSIX = find_spec("fcntl") is not None


def lock_shared(descriptor: int) -> None:
    """Lock an open folder together with others, as soon as nobody has it alone."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)


def lock_alone(descriptor: int) -> None:
    """Lock an open folder for this process.

    Raises:
        BlockingIOError: If another one has locked it.
        OSError: If the file system knows no locks.

    """
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def unlock(descriptor: int) -> None:
    """Let go of a lock. Closing is not enough: a child process that was forked meanwhile has it, too."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
