"""Results: targets, a JSON file, and a table."""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich import box
from rich.console import Console
from rich.table import Table

Item = TypeVar("Item")

#: Seconds between two lines of progress.
_TELL_EVERY = 10.0


@dataclass(frozen=True)
class Target:
    """A figure and its upper bound."""

    name: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether the figure is within its bound."""
        return self.value <= self.limit


def machine() -> dict[str, Any]:
    """Describe the machine, without date and name, so that equal runs give equal files."""
    packages = ("torch", "lightning", "safetensors")
    return {
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "processor": _processor(),
        "system": platform.system(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        **{package: version(package) for package in packages},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def median(samples: Sequence[float]) -> float:
    """Return the median; NaN, which Python's JSON readers accept, if nothing was measured."""
    return statistics.median(samples) if samples else float("nan")


def progress(line: str) -> None:
    """Print progress and the time of day to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def counted(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Count items on stderr, every few seconds and at the end.

    Args:
        items: The items.
        total: Their number.
        what: What they are, e.g. ``"mlr_mnist: failures"``.

    """
    told = time.monotonic()
    for number, item in enumerate(items, start=1):
        if number == total or time.monotonic() - told > _TELL_EVERY:
            told = time.monotonic()
            progress(f"{what}: {number} of {total}")
        yield item


def write(path: str | None, figures: Mapping[str, Any], targets: Sequence[Target]) -> None:
    """Write figures, targets and machine as JSON.

    Args:
        path: The file; ``None`` for none.
        figures: Flat: the medians and ratios; nested: samples and settings.
        targets: The targets.

    """
    if path is None:
        return
    content = {**figures, "targets": [{**asdict(t), "met": t.met} for t in targets], "machine": machine()}
    Path(path).write_text(json.dumps(content, indent=2) + "\n")


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], targets: Sequence[Target]) -> None:
    """Print the figures and how they compare with the targets."""
    table = _table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    _console().print(table)
    if targets:
        show_targets(targets)


def show_targets(targets: Sequence[Target]) -> None:
    """Print the targets, and whether they were met."""
    verdict = _table("target", "measured", "at most", "", title="targets")
    for target in targets:
        verdict.add_row(
            target.name, f"{target.value:.4g}", f"{target.limit:.4g}", "[green]met" if target.met else "[red]missed"
        )
    _console().print(verdict)


def _table(*columns: str, title: str) -> Table:
    """Return a table, in Markdown if the output is a file."""
    return Table(*columns, title=title, box=box.HEAVY_HEAD if _console().is_terminal else box.MARKDOWN)


def _console() -> Console:
    console = Console()
    if not console.is_terminal:
        # A file has no width; do not truncate cells.
        console.width = 160
    return console


def arguments(description: str, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the flags that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds, to check that it works")
    parser.add_argument("--rounds", type=int, help=f"how often each thing is measured (default {rounds}, quick 2)")
    add_places(parser)
    return parser


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add the flags for output paths, which are checked before anything is measured."""
    parser.add_argument("--json", type=_output, metavar="OUT", help="write the figures to this file")
    parser.add_argument("--dir", type=_folder, help="where to put a temporary folder (default: the working directory)")


def _folder(path: str) -> Path:
    if not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path!r}: make it first")
    return Path(path)


def _output(path: str) -> str:
    if Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"{path!r} is a folder: name a file")
    return str(_folder(os.path.dirname(path) or ".") / os.path.basename(path))


@contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    """Create a temporary folder on a real disk (``/tmp`` may be memory)."""
    folder = Path(tempfile.mkdtemp(prefix=".benchmark-", dir=parent or Path.cwd()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
