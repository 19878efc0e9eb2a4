"""The pages of a file that is not needed any more, for the next one of its folder."""

import fcntl
import os
import signal
from contextlib import suppress
from pathlib import Path

#: Smaller files are not worth it.
_SMALLEST = 1 << 20


class SpareFile:
    """Keeps one deleted file, hidden, until another one is written in its place.

    Memory that is given back and taken anew costs more than what is written to it: the system clears every page and
    accounts for it, and below a virtual machine the host may have taken it away meanwhile. Not thread-safe.

    Example::

        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "old").write_bytes(bytes(2_000_000))
        >>> spare = SpareFile()
        >>> spare.delete(folder / "old", folder / ".spare", at_most=1_500_000)
        >>> (folder / "old").exists()
        False
        >>> spare.take(folder / "new"), (folder / "new").stat().st_size
        (True, 1500000)

    """

    def __init__(self) -> None:
        self._path: Path | None = None

    def delete(self, path: Path, hidden: Path, at_most: int) -> None:
        """Deletes a file, or hides it if that is worth it and nobody has it open: they would see it change.

        Args:
            path: The file; one that is already gone is no error.
            hidden: The name that it gets, on the same file system; nobody else may open that.
            at_most: Bytes to keep.

        Raises:
            OSError: If it may not be deleted.

        """
        if self._path is not None or not _is_worth_it(path, at_most):
            path.unlink(missing_ok=True)
            return
        path.rename(hidden)
        if _is_open(hidden):
            hidden.unlink()
            return
        os.truncate(hidden, min(hidden.stat().st_size, at_most))
        self._path = hidden

    def take(self, path: Path) -> bool:
        """Gives the file that was kept another name, if there is one; its bytes are still the old ones."""
        kept, self._path = self._path, None
        with suppress(OSError):
            if kept is not None:
                kept.rename(path)
                return True
        return False

    def drop(self) -> None:
        """Deletes the file that was kept, if there is one."""
        kept, self._path = self._path, None
        if kept is not None:
            kept.unlink(missing_ok=True)


def _is_worth_it(path: Path, at_most: int) -> bool:
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_nlink == 1 and min(status.st_size, at_most) >= _SMALLEST
    return False


def _is_open(path: Path) -> bool:
    """Whether anybody has a file open or mapped, as far as can be told."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return True
    descriptor = os.open(path, os.O_RDWR)
    try:
        # Who opens it meanwhile has the system send a signal, by default one that ends the process.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        # The system grants it only to the one who alone has the file open.
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
