"""Which place a local path names, whatever leads there: symbolic links, bind mounts, volumes of containers."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_MOUNTS = Path("/proc/self/mountinfo")


class _Mount(NamedTuple):
    """A line of ``mountinfo`` (``man 5 proc_pid_mountinfo``)."""

    number: str
    source: str
    root: str
    point: str

    @property
    def volume(self) -> str:
        """What is mounted, by a name that nothing else has: of disks and most servers one that stays the same."""
        is_named = self.source.startswith("/dev/") or (":/" in self.source and not self.source.startswith("127."))
        return self.source if is_named else f"{self.source} {self.number}"


def place_of(path: str) -> str:
    """The device or server that a path leads to, and the path there.

    The same path names different places in two containers that mount different volumes, and different paths may name
    the same one.

    Args:
        path: A local path; nothing need be there yet.

    Returns:
        For example ``"/dev/sda1:/volumes/a/run"``; where the system does not tell of its mounts, just the path.

    Example::

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> os.symlink(folder, f"{folder}/link")
        >>> place_of(f"{folder}/link/run") == place_of(f"{folder}/run") != place_of(f"{folder}/other")
        True

    """
    path = os.path.realpath(path)
    above = [mount for mount in _mounts() if os.path.commonpath([path, mount.point]) == mount.point]
    if not above:
        return path
    # Of several at one point the last one hides the others.
    mount = max(reversed(above), key=lambda mount: len(mount.point))
    there = os.path.join(mount.root, os.path.relpath(path, mount.point))
    return f"{mount.volume}:{os.path.normpath(there)}"


def _mounts() -> Iterator[_Mount]:
    with suppress(OSError):
        for line in os.fsdecode(_MOUNTS.read_bytes()).split("\n")[:-1]:
            _, _, number, root, point, *_ = fields = [_unescaped(field) for field in line.split(" ")]
            yield _Mount(number, fields[fields.index("-") + 2], root, point)


def _unescaped(field: str) -> str:
    return re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), field)
