"""moonclip for comparison: XOR deltas and zstd in Rust, from a folder of its own.

It is downloaded once to the user's cache, and needs only the installed torch.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from benchmarks import report
from benchmarks.methods import Method, ToOnePath

VERSION = "0.3.1"
_SECONDS = 300
#: Its data types for floats, by the names of the methods.
_KINDS = {"moonclip": None, "moonclip_bf16": "bf16"}


class Moonclip(ToOnePath):
    """``CheckpointManager.save`` of model and optimizer, with fsync, at its strongest.

    Rust copies saves on all cores and writes them in its own threads. It keeps the state of its last full save in
    memory and writes differences to it. zstd's level 1 was faster than its default 3.

    Args:
        manager: Its class.
        name: Its name.
        folder: Where to write.
        save_dtype: The type that floats are rounded to; ``None`` for no rounding.

    """

    #: The first save is a full one, and is the base of the others.
    warm_ups = 1
    is_slow = True

    def __init__(self, manager: Any, name: str, folder: Path, save_dtype: str | None) -> None:
        super().__init__(name, folder / name)
        self._manager = manager(
            str(self.path), save_dtype=save_dtype, compression_level=1, max_total_snapshots=3, world_size=1, rank=0
        )
        self._saves = 0

    def save(self, trainer: pl.Trainer) -> None:
        self._saves += 1
        self._manager.save(step=self._saves, model=trainer.model, optimizer=trainer.optimizers[0])

    @override
    def wait(self) -> None:
        self._manager.flush()

    @override
    def discard(self, counts: bool) -> None:
        # What it has written is the base of its next saves; it keeps three older ones.
        pass

    @override
    def close(self) -> None:
        self.wait()
        shutil.rmtree(self.path, ignore_errors=True)


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--moonclip``."""
    help_text = "a folder that has moonclip, or 'no'; by default it is downloaded to ~/.cache"
    parser.add_argument("--moonclip", help=help_text)


def methods(chosen: str | None, folder: Path) -> list[Method]:
    """Return its ways to save; none, with a message, if it is not available.

    Args:
        chosen: The value of ``--moonclip``.
        folder: Where to save.

    """
    if chosen == "no":
        return []
    place = chosen
    try:
        place = chosen or _download()
        # At the end, so that it hides nothing that is installed here.
        sys.path.append(place)
        manager = importlib.import_module("moonclip").CheckpointManager
    except (OSError, ImportError, AttributeError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        report.progress(f"moonclip {VERSION} is not available and is left out: {str(reason).strip()[-500:]}")
        return []
    finally:
        if place in sys.path:
            sys.path.remove(place)
    return [Moonclip(manager, name, folder, save_dtype) for name, save_dtype in _KINDS.items()]


def _download() -> str:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "lightning-scar" / f"moonclip-{VERSION}-{sys.version_info[0]}.{sys.version_info[1]}"
    ready = folder / ".ready"
    if not ready.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps", "--only-binary=:all:"]
        command = [*pip, "--target", str(folder), f"moonclip=={VERSION}"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        ready.touch()
    return str(folder)
