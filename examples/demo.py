"""What a SIGKILL costs: SCARCheckpoint against Lightning's ModelCheckpoint, at equal bytes written.

    make demo
    python examples/demo.py --kill-after 250 350 450 550 650 750

Two trainings with the same seed and the same batches run side by side. Both are killed after the same step, and both
are started again.

Of a run of 1,000 steps ModelCheckpoint writes the whole state ten times, every 100 steps. SCARCheckpoint writes it
once, in its first save, and then an eighth of it a save; every 15 steps come to the same bytes, first save, skeletons
and headers included.

The kills come half way between two saves of ModelCheckpoint, an average moment; the first one is drawn. Each is one
sample: it may cost either of them more.
"""

import argparse
import csv
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from demo_plot import plot
from demo_training import Line
from lightning_scar.core.restoration import restore
from lightning_scar.storage.store import DeltaStore

RUN = 1000
EVERY = {"SCARCheckpoint": 15, "ModelCheckpoint": 100}
STEPS_AFTER_KILL = 120
FOLDER = Path("runs/demo")
PICTURE = Path("demo.png")


@dataclass(frozen=True)
class Run:
    """A training that was killed and went on.

    Attributes:
        name: The callback that saved.
        every: Steps between two saves.
        before: A line a step until the kill.
        after: A line a step from the restart on; the first one is the state that it starts from.
        oldest_step: The step of the oldest block that it starts from.
    """

    name: str
    every: int
    before: list[Line]
    after: list[Line]
    oldest_step: int

    @property
    def saves(self) -> list[int]:
        """Bytes of each save."""
        written = sorted({line.bytes_written for line in self.before})
        return [after - before for before, after in pairwise(written)]

    @property
    def bytes_of_run(self) -> float:
        """Bytes that a run of :data:`RUN` steps comes to."""
        first, *later = self.saves
        return first + (RUN / self.every - 1) * sum(later) / len(later)

    @property
    def rework(self) -> int | None:
        """Steps after the restart until the held-out loss is back where it was, if it ever is."""
        goal = self.before[-1].held_out_loss
        return next((n for n, line in enumerate(self.after) if line.held_out_loss <= goal), None)


def main() -> None:
    arguments = argparse.ArgumentParser(description="Kill two trainings and start them again.")
    arguments.add_argument(
        "--kill-after", type=int, nargs="+", default=[250, 350, 450], metavar="STEP", help="by default %(default)s"
    )
    moments: list[int] = arguments.parse_args().kill_after
    if min(moments) <= 200:
        arguments.error("--kill-after must be above 200: before that ModelCheckpoint has not saved twice")

    console = Console()
    found = []
    for kill_after in moments:
        with console.status(f"Two trainings are killed after step {kill_after} and started again ..."):
            runs = killed_and_resumed(kill_after)
        console.print(table(runs), "")
        found.append(runs)
    plot(found[0], PICTURE)
    if len(found) > 1:
        console.print(summary(found), "")
    console.print(f"Loss against steps: {PICTURE.resolve()}", soft_wrap=True)


def killed_and_resumed(kill_after: int) -> list[Run]:
    shutil.rmtree(FOLDER, ignore_errors=True)
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda name: kill_and_resume(name, EVERY[name], kill_after), EVERY))
    if len({tuple(line.held_out_loss for line in run.before) for run in runs}) > 1:
        sys.exit("The two trainings differ before the kill, so they cannot be compared.")
    return runs


def kill_and_resume(name: str, every: int, kill_after: int) -> Run:
    folder = FOLDER / name
    folder.mkdir(parents=True)
    options = [name, str(folder), "--every", str(every), "--steps", str(kill_after + STEPS_AFTER_KILL)]
    train([*options, "--kill-after", str(kill_after)], folder / "first.log", -signal.SIGKILL)
    before = read_journal(folder)
    steps = restore(DeltaStore(folder / "saved")).plan.steps.values() if name == "SCARCheckpoint" else []
    train(options, folder / "second.log", 0)
    after = read_journal(folder)[len(before) :]
    return Run(name, every, before, after, min([after[0].step, *steps]))


def train(options: list[str], log: Path, expected_status: int) -> None:
    command = [sys.executable, str(Path(__file__).with_name("demo_training.py")), *options]
    with log.open("w") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if status != expected_status:
        raise RuntimeError(f"the training ended with status {status}, not {expected_status}: see {log}")


def read_journal(folder: Path) -> list[Line]:
    with (folder / "journal.csv").open(newline="") as file:
        return [Line(int(s), float(t), float(h), int(b)) for s, t, h, b in csv.reader(file)]


def table(runs: list[Run]) -> Table:
    rows: dict[str, list[object]] = {
        "saves every": [f"{run.every} steps" for run in runs],
        "first save": [f"{run.saves[0] / 1e6:.2f} MB" for run in runs],
        f"bytes in a run of {RUN} steps": [f"{run.bytes_of_run / 1e6:.1f} MB" for run in runs],
        "step of the kill": [run.before[-1].step for run in runs],
        "step resumed": [run.after[0].step for run in runs],
        "oldest block": [f"{run.after[0].step - run.oldest_step} steps older" for run in runs],
        "held-out loss before": [f"{run.before[-1].held_out_loss:.4f}" for run in runs],
        "held-out loss after": [f"{run.after[0].held_out_loss:.4f}" for run in runs],
        "steps to regain the loss": [run.rework if run.rework is not None else "never regained" for run in runs],
    }
    return rendered("One SIGKILL, at equal bytes written", "", runs, rows)


def summary(found: list[list[Run]]) -> Table:
    rework = [[run.rework if run.rework is not None else float("nan") for run in runs] for runs in found]
    rows: dict[str, list[object]] = {
        str(runs[0].before[-1].step): [*steps] for runs, steps in zip(found, rework, strict=True)
    }
    rows["mean"] = [f"{sum(steps) / len(steps):.1f}" for steps in zip(*rework, strict=True)]
    return rendered("Steps to regain the loss", "killed after", found[0], rows)


def rendered(title: str, corner: str, runs: list[Run], rows: dict[str, list[object]]) -> Table:
    result = Table(corner, *(run.name for run in runs), title=title)
    for name, cells in rows.items():
        result.add_row(name, *map(str, cells))
    for column in result.columns[1:]:
        column.justify = "right"
    return result


if __name__ == "__main__":
    main()
