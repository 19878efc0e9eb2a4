"""What a SIGKILL costs: SCARCheckpoint against Lightning's ModelCheckpoint, at equal bytes per step.

    make demo
    python examples/demo.py --kill-after 448

Two trainings with the same seed and the same batches run side by side. Both are killed after the same step, and both
are started again.

ModelCheckpoint writes the whole state every 100 steps. SCARCheckpoint writes it once, in its first save, and then an
eighth of it a save. A delta also carries the skeleton and a header, 5 % of such a small one: that is why it saves every
13 steps here, not every 12.5, to come to the same bytes in 100 steps. The first save comes on top, once in a run.

By default the kill comes half way between two saves of either, an average moment. Still, one kill is one sample: other
moments cost either of them more or less, and ``--kill-after`` tries them.
"""

import argparse
import csv
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from demo_plot import plot
from demo_training import Line
from lightning_scar.core.restoration import restore
from lightning_scar.storage.store import DeltaStore

STEPS_AFTER_KILL = 60
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
    def first_save(self) -> int:
        """Bytes of the first save."""
        return min(line.bytes_written for line in self.before if line.bytes_written)

    @property
    def bytes_per_step(self) -> float:
        """Bytes that the later saves wrote, spread over the steps."""
        written = {line.bytes_written for line in self.before if line.bytes_written}
        return (max(written) - min(written)) / max(1, len(written) - 1) / self.every

    @property
    def rework(self) -> int | None:
        """Steps after the restart until the held-out loss is back where it was, if it ever is."""
        goal = self.before[-1].held_out_loss
        return next((n for n, line in enumerate(self.after) if line.held_out_loss <= goal), None)


def main() -> None:
    arguments = argparse.ArgumentParser(description="Kill two trainings and start them again.")
    arguments.add_argument("--kill-after", type=int, default=253, metavar="STEP", help="by default %(default)s")
    kill_after: int = arguments.parse_args().kill_after
    if kill_after <= 100:
        arguments.error("--kill-after must be above 100: before that ModelCheckpoint has saved nothing")

    console = Console()
    shutil.rmtree(FOLDER, ignore_errors=True)
    with ThreadPoolExecutor() as pool, console.status("Two trainings are killed and started again ..."):
        running = [
            pool.submit(kill_and_resume, name, every, kill_after)
            for name, every in (("SCARCheckpoint", 13), ("ModelCheckpoint", 100))
        ]
        runs = [run.result() for run in running]
    if len({tuple(line.held_out_loss for line in run.before) for run in runs}) > 1:
        sys.exit("The two trainings differ before the kill, so they cannot be compared.")
    console.print(table(runs))
    plot(runs, PICTURE)
    console.print(f"Loss against steps: {PICTURE.resolve()}", soft_wrap=True)


def kill_and_resume(name: str, every: int, kill_after: int) -> Run:
    folder = FOLDER / name
    folder.mkdir(parents=True)
    options = [name, str(folder), "--every", str(every), "--steps", str(kill_after + STEPS_AFTER_KILL)]
    train([*options, "--kill-after", str(kill_after)], folder / "first.log", -signal.SIGKILL)
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
    rows: dict[str, list[object]] = {
        "saves every": [f"{run.every} steps" for run in runs],
        "first save": [f"{run.first_save / 1e6:.2f} MB" for run in runs],
        "then, in 100 steps": [f"{run.bytes_per_step * 100 / 1e6:.2f} MB" for run in runs],
        "step of the kill": [run.before[-1].step for run in runs],
        "step resumed": [run.after[0].step for run in runs],
        "oldest block": [f"{run.after[0].step - run.oldest_step} steps older" for run in runs],
        "held-out loss before": [f"{run.before[-1].held_out_loss:.4f}" for run in runs],
        "held-out loss after": [f"{run.after[0].held_out_loss:.4f}" for run in runs],
        "steps to regain the loss": [run.rework if run.rework is not None else "never regained" for run in runs],
    }
    result = Table("", *(run.name for run in runs), title="One SIGKILL, at equal bytes per step after the first save")
    for name, cells in rows.items():
        result.add_row(name, *map(str, cells))
    for column in result.columns[1:]:
        column.justify = "right"
    return result


if __name__ == "__main__":
    main()
