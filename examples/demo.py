"""What a SIGKILL costs when every way to save may take the same share of the training time.

    make demo

One training, three ways to save: Lightning's ModelCheckpoint, the same with AsyncCheckpointIO, and SCARCheckpoint with
its defaults. SCARCheckpoint chooses its own interval; for the other two a short run measures what a save adds to the
training, which determines their interval.

Each training is killed halfway between two of its saves, an average moment, and restarted. What counts is the number of
steps until the held-out loss is back where it was at the kill.
"""

import argparse
import csv
import math
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from demo_plot import plot
from demo_training import Line

METHODS = ("SCARCheckpoint", "AsyncCheckpointIO", "ModelCheckpoint")
#: The share of the training time that SCARCheckpoint takes by default.
SHARE = 0.01
#: Steps of the short run, and of the time between its saves.
MEASURED, APART = 100, 20
#: No training is killed before it saves after this step. Lightning's save at least once in this many steps, or the demo
#: would take too long.
EARLIEST, RAREST = 200, 400
FOLDER = Path("runs/demo")
PICTURE = Path("demo.png")


@dataclass(frozen=True)
class Run:
    """A training that was killed and resumed.

    Attributes:
        name: The way to save.
        before: A line per step until the kill.
        after: A line per step from the restart on; the first one is the state that it starts from.
    """

    name: str
    before: list[Line]
    after: list[Line]

    @property
    def saves(self) -> list[int]:
        """The steps after which saves began."""
        return [line.step for line, later in pairwise(self.before) if later.begun > line.begun]

    @property
    def every(self) -> int:
        """Steps between the last two saves."""
        before, last = [0, *self.saves][-2:]
        return last - before

    @property
    def step_seconds(self) -> float:
        """Seconds of a step."""
        return step_seconds(self.before)

    @property
    def share(self) -> float:
        """The share by which saves lengthen the training, from the median save without the first."""
        begun = [i for i, (line, later) in enumerate(pairwise(self.before)) if later.begun > line.begun]
        costs = [
            cost_of_saves(self.before[start : stop + 1], self.step_seconds)
            for start, stop in pairwise([*begun, len(self.before)])
        ]
        return statistics.median(costs[1:] or costs) / (self.every * self.step_seconds)

    @property
    def rework(self) -> int | None:
        """Steps after the restart until the held-out loss is back where it was, if it ever is."""
        goal = self.before[-1].held_out_loss
        return next((n for n, line in enumerate(self.after) if line.held_out_loss <= goal), None)


def step_seconds(lines: list[Line]) -> float:
    """Return the median time of a step without a save under way."""
    return statistics.median(later.clock - line.clock for line, later in pairwise(lines) if not is_busy(line, later))


def cost_of_saves(lines: list[Line], usual: float) -> float:
    """Return by how many seconds the steps with a save under way took longer than usual."""
    return sum(later.clock - line.clock - usual for line, later in pairwise(lines) if is_busy(line, later))


def is_busy(line: Line, later: Line) -> bool:
    """Return whether a save was under way between two lines."""
    return later.begun > line.begun or line.begun > line.written


def main() -> None:
    arguments = argparse.ArgumentParser(description="Kill three trainings and restart them.")
    arguments.add_argument("--quick", action="store_true", help="save more often and kill earlier, as a check")
    quick: bool = arguments.parse_args().quick

    console = Console()
    shutil.rmtree(FOLDER, ignore_errors=True)
    with console.status("What does a save cost?") as status:
        every = {name: 30 if quick else interval(name) for name in METHODS if name != "SCARCheckpoint"}
        kill_from = max(60 if quick else EARLIEST, *every.values())
        runs = []
        for name in METHODS:
            status.update(f"{name}: a training is killed after about {kill_from} steps and restarted ...")
            runs.append(kill_and_resume(name, every.get(name), kill_from))
            console.print(f"{name}: {outcome(runs[-1])}")
    console.print(table(runs), "")
    plot(runs, PICTURE)
    said = "Quick: the intervals are not measured, so the figures mean nothing." if quick else conclusion(runs)
    console.print(said, "", soft_wrap=True)
    console.print(f"Loss against steps: {PICTURE.resolve()}", soft_wrap=True)


def interval(name: str) -> int:
    """Return the steps between saves, from what saves add to a short training."""
    folder = FOLDER / f"{name}-measured"
    folder.mkdir(parents=True)
    train([name, str(folder), "--every", str(APART), "--steps", str(MEASURED)], folder / "log", 0)
    lines = read_journal(folder)
    # The first save is slower: files and memory are new. The last one has no steps behind it.
    counted = lines[APART + APART // 2 :]
    saves, usual = counted[-1].begun - counted[0].begun, step_seconds(counted)
    return min(max(1, math.ceil(cost_of_saves(counted, usual) / saves / (SHARE * usual))), RAREST)


def kill_and_resume(name: str, every: int | None, kill_from: int) -> Run:
    folder = FOLDER / name
    folder.mkdir(parents=True)
    options = [name, str(folder), *(["--every", str(every)] if every else [])]
    limit = kill_from + 5 * RAREST
    killing = ["--steps", str(limit), "--kill-from", str(kill_from)]
    train([*options, *killing], folder / "first.log", -signal.SIGKILL)
    before = read_journal(folder)
    goal = before[-1].held_out_loss
    train([*options, "--steps", str(limit + RAREST), "--goal", str(goal)], folder / "second.log", 0)
    return Run(name, before, read_journal(folder)[len(before) :])


def train(options: list[str], log: Path, expected_status: int) -> None:
    command = [sys.executable, str(Path(__file__).with_name("demo_training.py")), *options]
    with log.open("w") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if status != expected_status:
        raise RuntimeError(f"the training ended with status {status}, not {expected_status}: see {log}")


def read_journal(folder: Path) -> list[Line]:
    with (folder / "journal.csv").open(newline="") as file:
        return [Line(int(s), float(c), float(h), int(b), int(w)) for s, c, h, b, w in csv.reader(file)]


def outcome(run: Run) -> str:
    """Describe how many steps a kill cost."""
    return f"{run.rework} steps to regain the loss" if run.rework is not None else "the loss was not regained"


def table(runs: list[Run]) -> Table:
    rows: dict[str, list[object]] = {
        "saves every": [f"{run.every} steps" for run in runs],
        "time spent on saving, in the long run": [f"{run.share:.1%}" for run in runs],
        "killed after step": [run.before[-1].step for run in runs],
        "resumed at step": [run.after[0].step for run in runs],
        "held-out loss before": [f"{run.before[-1].held_out_loss:.4f}" for run in runs],
        "held-out loss after": [f"{run.after[0].held_out_loss:.4f}" for run in runs],
        "steps to regain the loss": [run.rework if run.rework is not None else "never regained" for run in runs],
    }
    result = Table("", *(run.name for run in runs), title=f"One SIGKILL, when saves may take {SHARE:.0%} of the time")
    for name, cells in rows.items():
        result.add_row(name, *map(str, cells))
    for column in result.columns[1:]:
        column.justify = "right"
    return result


def conclusion(runs: list[Run]) -> str:
    """Describe what was measured, and what was not."""
    size = f"22 MB of state, steps of {1000 * runs[0].step_seconds:.0f} ms"
    lost = ", ".join(f"{run.name} {run.rework if run.rework is not None else 'never'}" for run in runs)
    return (
        f"Steps to regain the loss after one kill halfway between two saves, on this machine, with {size}: {lost}. "
        "This is one kill each, and the cost of a save differs between runs and disks; docs/results.md has the means "
        "of many failures, and docs/benchmarks.md a larger model."
    )


if __name__ == "__main__":
    main()
