"""Runs parts in processes of their own, each with a limit, and tells what came of them: a table, and JSON."""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gpu.cards import MORE_CARDS
from gpu.part import Part
from gpu.parts import PARTS
from gpu.processes import Processes

ROOT = Path(__file__).parents[2]
#: Seconds of all parts together.
LIMIT = 480.0
#: Cores that a part with several ranks takes.
_CORES = 4
_COLOURS = {"passed": "green", "failed": "red", "timed out": "red", "skipped": "yellow"}


class Driver:
    """Runs parts.

    Args:
        device: ``cuda``, or ``cpu``.
        is_quick: Whether parts are only to be tried.
        folder: Where they write.
        limit: Seconds for all of them.

    """

    def __init__(self, device: str, is_quick: bool, folder: Path, limit: float) -> None:
        self._options = ["--device", device, *(["--quick"] if is_quick else [])]
        self._folder = folder
        self._deadline = time.monotonic() + limit
        self._processes = Processes()

    def run_all(self, parts: Sequence[Part]) -> dict[str, dict[str, Any]]:
        """Run those that measure, one after the other, and then the rest, some at a time; return what comes of each."""
        results: dict[str, dict[str, Any]] = {}
        at_a_time = max(1, (os.cpu_count() or 1) // _CORES)
        try:
            for is_alone in (True, False):
                group = [part for part in parts if part.is_alone == is_alone]
                self._run_some(group, 1 if is_alone else at_a_time, results)
        finally:
            self._processes.end_all()
        return results

    def _run_some(self, parts: Sequence[Part], at_a_time: int, results: dict[str, dict[str, Any]]) -> None:
        with ThreadPoolExecutor(at_a_time) as pool:
            todo: dict[Future[dict[str, Any]], Part] = {pool.submit(self._run, part): part for part in parts}
            try:
                while todo:
                    for future in wait(todo, return_when=FIRST_COMPLETED).done:
                        part = todo.pop(future)
                        results[part.name] = future.result()
                        _tell(part, results[part.name])
            except BaseException:
                # Ctrl-C, which parts do not get: the pool would wait for them.
                self._processes.end_all()
                raise

    def _run(self, part: Part) -> dict[str, Any]:
        began = time.monotonic()
        limit = min(part.seconds, self._deadline - began)
        if limit <= 0:
            return {"state": "skipped", "why": "no time was left for it", "seconds": 0.0}
        own = Path(tempfile.mkdtemp(prefix=f"{part.name}-", dir=self._folder))
        out, log, folder = own / "out.txt", own / "log.txt", own / "files"
        folder.mkdir()
        command = [sys.executable, "-m", "tests.gpu", "--part", part.call, "--folder", str(folder), *self._options]
        code = self._processes.run(command, ROOT, _environment(), out, log, limit)
        if code is None:
            found: dict[str, Any] = {"state": "timed out", "why": f"not done after {limit:.0f} s"}
        else:
            found = last_line(out.read_text()) or {
                "state": "failed",
                "why": f"it ended with exit code {code} and told nothing",
            }
        found["seconds"] = round(time.monotonic() - began, 1)
        if found["state"] in ("failed", "timed out"):
            found["output"] = log.read_text(errors="replace")[-20_000:]
        return found


def _environment() -> dict[str, str]:
    """Return the variables of parts, whose workers find the package where it is not installed, too."""
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
    # Without the last one cuBLAS may compute other bits in the same place of another run.
    more = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return {**os.environ, **more}


def last_line(output: str) -> dict[str, Any] | None:
    """What a part has told; ``None`` if it has not."""
    lines = output.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return found if isinstance(found, dict) and "state" in found else None


def _tell(part: Part, found: dict[str, Any]) -> None:
    print(f"{part.name}: {found['state']} after {found['seconds']:.0f} s", file=sys.stderr, flush=True)
    for line in found.get("output", "").splitlines()[-15:]:
        print(f"    {line}", file=sys.stderr, flush=True)


# -- what is printed -----------------------------------------------------------------------------------------------


def show(parts: Sequence[Part], results: dict[str, dict[str, Any]], device: str) -> None:
    """Print the table, and what needs more than one card."""
    console = Console()
    if not console.is_terminal:
        # A file has no width; do not truncate cells.
        console.width = 200
    frame = box.HEAVY_HEAD if console.is_terminal else box.MARKDOWN
    table = Table("part", "", "s", "what", title=f"on {device}", box=frame)
    for part in parts:
        found = results[part.name]
        state = found["state"]
        told = ", ".join(
            f"{name} {_short(value)}" for name, value in found.get("figures", {}).items() if name in part.tells
        )
        what = "; ".join(text for text in (found.get("why", ""), told) if text) or part.shows
        table.add_row(part.name, f"[{_COLOURS[state]}]{state}[/]", f"{found['seconds']:.0f}", escape(what))
    console.print(table)
    console.print("More than one card is needed for:")
    for need in MORE_CARDS:
        console.print(f"  {need.what}\n    {need.command}", markup=False, highlight=False, soft_wrap=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# -- the command ---------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; return 1 if anything failed."""
    options = _options(arguments)
    parts = [PARTS[name] for name in dict.fromkeys(options.parts or PARTS)]
    with tempfile.TemporaryDirectory(prefix=".gpu-", dir=options.dir, ignore_cleanup_errors=True) as folder:
        results = Driver(options.device, options.quick, Path(folder).resolve(), options.limit).run_all(parts)
    show(parts, results, options.device)
    if options.json:
        found = {"device": options.device, "quick": options.quick, "parts": results}
        options.json.write_text(json.dumps({**found, "more_cards": list(map(asdict, MORE_CARDS))}, indent=2) + "\n")
    return int(any(found["state"] in ("failed", "timed out") for found in results.values()))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = "\n".join(f"  {part.name:14} {part.shows}" for part in PARTS.values())
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu",
        description=f"{__doc__}\n\nparts:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the parts themselves")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="NAME", help="only these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found to this file")
    parser.add_argument("--dir", type=Path, default=ROOT, help="where to put large files (default: the repository)")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for all parts (default {LIMIT:.0f})")
    parser.add_argument("--quick", action="store_true", help="small models, to try the parts")
    return parser.parse_args(arguments)
