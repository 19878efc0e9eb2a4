"""How much of a host's memory files take."""

import os
from contextlib import suppress
from pathlib import Path


def bytes_in(root: Path, folder: str | None = None) -> int:
    """Bytes of all files below a folder, hidden ones included; one that is deleted meanwhile is none.

    Args:
        root: The folder.
        folder: Counts only what lies in folders of this name, such as those that one rank has in several starts.

    Example::

        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("this start/rank-0000", "a dead start/rank-0000", "this start/rank-0001"):
        ...     (root / name).mkdir(parents=True)
        ...     _ = (root / name / "delta").write_bytes(bytes(100))
        >>> bytes_in(root), bytes_in(root, "rank-0000")
        (300, 200)

    """
    found = 0
    for path, _, names in os.walk(root):
        for name in names if folder in (None, os.path.basename(path)) else ():
            with suppress(FileNotFoundError):
                found += os.lstat(os.path.join(path, name)).st_size
    return found
