"""What a SIGKILL costs: SCARCheckpoint against Lightning's ModelCheckpoint, at equal bytes written.

    make demo

Two trainings with the same seed and the same batches run side by side. Both are killed after the same step, and both
are started again.

Until the kill ModelCheckpoint writes the whole state three times, after steps 100, 200 and 300. SCARCheckpoint writes it
once, in its first save, and an eighth of it in each later one. As a delta also carries the skeleton and a header, 5 % of
such a small one, the bytes are equal when it saves every 21 steps. The kill comes 50 steps after the last save of the
one, half of its interval, and 14 after that of the other, two thirds of its interval: for neither a lucky moment.
"""

import csv
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from demo_plot import plot
from demo_training import Line
from rich.console import Console
from rich.table import Table

from lightning_scar.core.restoration import restore
from lightning_scar.storage.store import DeltaStore

KILL_AFTER = 350
STEPS = 420
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
    def rework(self) -> int | None:
        """Steps after the restart until the held-out loss is back where it was, if it ever is."""
        goal = self.before[-1].held_out_loss
        return next((n for n, line in enumerate(self.after) if line.held_out_loss <= goal), None)


def main() -> None:
    console = Console()
    shutil.rmtree(FOLDER, ignore_errors=True)
    with ThreadPoolExecutor() as pool, console.status("Two trainings are killed and started again ..."):
        runs = list(pool.map(kill_and_resume, ["SCARCheckpoint", "ModelCheckpoint"], [21, 100]))
    if len({tuple(line.held_out_loss for line in run.before) for run in runs}) > 1:
        sys.exit("The two trainings differ before the kill, so they cannot be compared.")
    console.print(table(runs))
    plot(runs, PICTURE)
    console.print(f"Loss against steps: {PICTURE.resolve()}", soft_wrap=True)


def kill_and_resume(name: str, every: int) -> Run:
    folder = FOLDER / name
    folder.mkdir(parents=True)
    options = [name, str(folder), "--every", str(every), "--steps", str(STEPS)]
    train([*options, "--kill-after", str(KILL_AFTER)], folder / "first.log", -signal.SIGKILL)
    before = read_journal(folder)
    blocks = restore(DeltaStore(folder / "saved")).versions.values() if name == "SCARCheckpoint" else []
    train(options, folder / "second.log", 0)
    after = read_journal(folder)[len(before) :]
    return Run(name, every, before, after, min([after[0].step, *(block.step for block in blocks)]))


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
    rows = {
        "saves every": [f"{run.every} steps" for run in runs],
        "bytes written until the kill": [f"{run.before[-1].bytes_written / 1e6:.2f} MB" for run in runs],
        "step of the kill": [run.before[-1].step for run in runs],
        "step resumed": [run.after[0].step for run in runs],
        "oldest block": [f"{run.after[0].step - run.oldest_step} steps older" for run in runs],
        "held-out loss before": [f"{run.before[-1].held_out_loss:.4f}" for run in runs],
        "held-out loss after": [f"{run.after[0].held_out_loss:.4f}" for run in runs],
        "steps to regain the loss": [run.rework if run.rework is not None else "never regained" for run in runs],
    }
    result = Table("", *(run.name for run in runs), title="A SIGKILL at equal bytes written")
    for name, cells in rows.items():
        result.add_row(name, *map(str, cells))
    for column in result.columns[1:]:
        column.justify = "right"
    return result


if __name__ == "__main__":
    main()
