"""torchft for comparison: its own environment, which uses this one's torch, and its kills.

It is created once in the user's cache; the torch of this environment is not modified.
"""

import argparse
import os
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import kills, step_log
from benchmarks.found import Found
from benchmarks.kills import Run

VERSION = "0.2.0"
_SECONDS = 300
_RANKS = 3
_LIMIT = 40.0
#: torchft's requirements besides torch.
_NEEDED = ("opentelemetry-exporter-otlp-proto-http", "opentelemetry-sdk", "opentelemetry-api")


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--torchft``."""
    help_text = "a Python that has torchft, or 'no'; by default one is made under ~/.cache"
    parser.add_argument("--torchft", help=help_text)


def python(chosen: str | None) -> str | None:
    """Return the Python that has torchft; ``None``, with a message, if it is not available.

    Args:
        chosen: The value of ``--torchft``.

    """
    if chosen == "no":
        return None
    try:
        found = chosen or _make()
        subprocess.run([found, "-c", "import torchft"], check=True, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        print(f"torchft {VERSION} is not available and is left out: {str(reason).strip()[-500:]}", file=sys.stderr)
        return None
    return found


def _make() -> str:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "lightning-scar" / f"torchft-{VERSION}-{sys.version_info[0]}.{sys.version_info[1]}"
    program = str(folder / "bin" / "python")
    ready = folder / ".ready"
    if not ready.exists():
        pip = [program, "-m", "pip", "install", "--quiet"]
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [*pip, "--no-deps", f"torchft=={VERSION}"],
            [*pip, *_NEEDED],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        ready.touch()
    # Last, and each time: torch belongs to this environment, and pip must not see it.
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    link = folder / "lib" / version / "site-packages" / "zz-torch.pth"
    link.write_text(sysconfig.get_path("purelib") + "\n")
    return program


def command(program: str, *arguments: str) -> list[str]:
    """Return the command of one of its processes."""
    return [program, "-m", "benchmarks.torchft_training", *arguments]


@contextmanager
def lighthouse(program: str, folder: Path, heartbeat: float) -> Iterator[str]:
    """Run torchft's lighthouse, and yield its address.

    Args:
        program: The Python that has torchft.
        folder: The folder for its output.
        heartbeat: Seconds without a heartbeat after which a worker counts as dead.

    """
    arguments = ("--kind", "lighthouse", "--heartbeat", str(heartbeat))
    with Run(command(program, *arguments), folder, kills.environment()) as run:

        def addresses() -> list[str]:
            return [line for line in run.output.splitlines() if line.startswith("http")]

        if not run.wait_until(lambda: bool(addresses()), 60):
            raise RuntimeError(f"torchft's lighthouse does not start:\n{run.output[-2000:]}")
        yield addresses()[0]


def kill_some(folder: Path, chosen: str | None, count: int, seed: int) -> dict[str, Found]:
    """Kill one of torchft's three ranks, each time in a fresh run; start a replacement at once.

    Args:
        folder: A scratch folder.
        chosen: The value of ``--torchft``.
        count: The number of kills.
        seed: The seed of victims and moments.

    Returns:
        The results, under ``"torchft"``; empty if it is not available.

    """
    program = python(chosen)
    if program is None:
        return {}
    found, chance = Found(), random.Random(seed)
    for turn in range(count):
        _kill_one(program, folder / f"torchft-{turn}", chance, found)
    return {"torchft": found}


def _kill_one(program: str, folder: Path, chance: random.Random, found: Found) -> None:
    victim = chance.randrange(_RANKS)
    with ExitStack() as stack:
        address = stack.enter_context(lighthouse(program, folder / "lighthouse", 5.0))

        def start(rank: int, name: str) -> Run:
            arguments = ("--kind", "torchft", "--rank", str(rank), "--width", "256", "--pause", "0.03")
            more = ("--lighthouse", address, "--folder", str(folder))
            return stack.enter_context(Run(command(program, *arguments, *more), folder / name, kills.environment()))

        runs = [start(rank, f"rank-{rank}") for rank in range(_RANKS)]
        if not runs[0].wait_until(lambda: _all_at(folder, 10), 90):
            raise RuntimeError(f"torchft's training does not start:\n{runs[0].output[-2000:]}")
        time.sleep(chance.uniform(0.3, 1.5))
        kill = step_log.Kill(time.monotonic(), victim, runs[victim].process.pid)
        runs[victim].process.kill()
        start(victim, "replacement")

        def is_over() -> bool:
            return step_log.recovery(step_log.read(folder), kill, _RANKS).rejoined_s is not None

        survivor = runs[(victim + 1) % _RANKS]
        survivor.wait_until(is_over, _LIMIT, poll=0.05)
    lines = step_log.read(folder)
    recovery = step_log.recovery(lines, kill, _RANKS)
    found.kills.append(kill)
    found.recoveries.append(recovery)
    found.redone.append(step_log.redone(lines))
    found.hung += recovery.rejoined_s is None


def _all_at(folder: Path, step: int) -> bool:
    last = {line.rank: line.step for line in step_log.read(folder)}
    return len(last) == _RANKS and min(last.values()) >= step
