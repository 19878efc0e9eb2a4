"""The files that workers leave for those that come after them: in memory, or on disk if that is full."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

#: The environment variable in which the supervisor names the folder in memory.
VARIABLE = "LIGHTNING_SCAR_STATE"
#: What leads from there to a folder on disk.
DISK = "disk"
#: The file that lists the modules that a worker has imported.
IMPORTS = "imports.json"


def write(name: str, fill: Callable[[IO[bytes]], Any], to_disk: bool = False) -> None:
    """Write a file atomically in this node's memory, or on its disk. An older one with this name is gone then.

    Args:
        name: Its name.
        fill: Writes to the open file.
        to_disk: Whether it should be on disk, where it may stay for long.

    Raises:
        OSError: If there is no room for it.
        KeyError: If there is no supervisor.

    """
    folders = _folders()
    failure: Exception | None = None
    for folder in reversed(folders) if to_disk else folders:
        try:
            _write_whole(folder / name, fill)
        # Torch raises a RuntimeError behind the OSError.
        except (OSError, RuntimeError) as error:
            failure = error.__context__ if isinstance(error.__context__, OSError) else error
            continue
        for other in folders:
            if other != folder:
                (other / name).unlink(missing_ok=True)
        if failure is not None:
            what = f"{name}, which a restart needs, is kept in {folder.resolve()}"
            print(f"lightning-scar: {what}: {failure}", file=sys.stderr, flush=True)
        return
    raise OSError(f"there is no room for {name}, which a restart needs: {failure}") from failure


def _write_whole(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    # Several workers of a node may write the same file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            fill(file)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def find(name: str) -> Path | None:
    """Return the path of a file that some worker of this node has written; ``None`` if there is none."""
    return next((folder / name for folder in _folders() if (folder / name).exists()), None)


def find_all(pattern: str) -> list[Path]:
    """Return the paths of all files that match; none without a supervisor."""
    folders = _folders() if VARIABLE in os.environ else []
    return [path for folder in folders for path in folder.glob(pattern)]


def in_memory(name: str) -> Path | None:
    """Return where a file of this name lies in this node's memory; ``None`` without a supervisor."""
    return Path(os.environ[VARIABLE]) / name if VARIABLE in os.environ else None


def _folders() -> list[Path]:
    memory = Path(os.environ[VARIABLE])
    return [memory, memory / DISK] if (memory / DISK).exists() else [memory]


@cache
def tell_imports() -> None:
    """Tell the supervisor which modules this worker, which trains, has imported: later ones then start with them."""
    path = in_memory(IMPORTS)
    if path is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        names = json.dumps(sorted(sys.modules)).encode()
        # Without room later ones start more slowly, no more.
        with suppress(OSError):
            _write_whole(path, lambda file: file.write(names))
