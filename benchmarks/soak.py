"""Does a training survive everything? ``python -m benchmarks.soak --seconds 300 --ranks 4 --every 5``.

Workers are killed again and again, sometimes two at once, sometimes while a replacement joins, and sometimes one is
stopped (SIGSTOP) until the others time out. At least one rank with the state always survives. The training has epochs
with a validation at the end. It must succeed with the right number of steps, each made once; all ranks must have
identical bits; no process and no file in memory may be left. Otherwise the exit code is 1.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks import kills, report, step_log
from benchmarks.kills import Run

_MEMORY = Path("/dev/shm")
_START_LIMIT = 180.0
#: Seconds after which a worker that was stopped counts as hanging.
_HANG_SECONDS = 5


def command(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command that starts the training."""
    run = [sys.executable, "-m", "lightning_scar", "run", "--nproc-per-node", str(options.ranks)]
    limits = ["--max-restarts", "100000", "--hang-timeout", str(_HANG_SECONDS)]
    own = ["--folder", str(folder), "--ranks", str(options.ranks), "--steps", str(steps(options))]
    more = ["--epoch-steps", str(options.epoch_steps), "--on-failure", options.on_failure, "--width", "128"]
    return [*run, *limits, "-m", "benchmarks.elastic_training", *own, *more, "--pause", str(options.pause)]


def steps(options: argparse.Namespace) -> int:
    """Return a number of steps that take at least as long as the kills."""
    return int(options.seconds / options.pause)


class Killer:
    """Chooses victims.

    Args:
        run: The training.
        ranks: The number of ranks.
        seed: The seed of its choices.

    """

    def __init__(self, run: Run, ranks: int, seed: int) -> None:
        self._run, self._ranks, self._chance = run, ranks, random.Random(seed)
        self.counts: Counter[str] = Counter()

    def strike(self, every: float) -> None:
        """Wait, then kill or stop one or two workers."""
        time.sleep(self._chance.uniform(0.3, 1.7) * every)
        kind = self._chance.choices(["one", "two", "joiner", "stop", "collective"], [5, 2, 2, 1, 2])[0]
        workers = self._run.workers()
        training = self._training(workers)
        joining = sorted(set(workers) - set(training))
        spare = len(training) - 1
        if kind == "joiner" and joining:
            self._kill(workers, [self._chance.choice(joining)], kind)
        elif kind == "stop" and spare > 1:
            self._signal(workers[self._chance.choice(training)], signal.SIGSTOP)
            self.counts[kind] += 1
        elif kind == "two" and spare >= 2:
            self._kill(workers, self._chance.sample(training, 2), kind)
        elif kind == "collective" and spare >= 1:
            self._signal(workers[self._chance.choice(training)], signal.SIGUSR1)
            self.counts[kind] += 1
        elif spare >= 1:
            self._kill(workers, [self._chance.choice(training)], "one")

    def _training(self, workers: dict[int, psutil.Process]) -> list[int]:
        """Return the ranks whose live workers have made a step: they have the state."""
        made = Counter(line.pid for line in self._run.lines())
        found = []
        for rank, process in sorted(workers.items()):
            with suppress(psutil.NoSuchProcess):
                # The first step may be the one in which it joined.
                if made[process.pid] > 1 and process.status() != psutil.STATUS_STOPPED:
                    found.append(rank)
        return found

    def _kill(self, workers: dict[int, psutil.Process], ranks: list[int], kind: str) -> None:
        for rank in ranks:
            self._signal(workers[rank], signal.SIGKILL)
        self.counts[kind] += 1

    @staticmethod
    def _signal(process: psutil.Process, number: signal.Signals) -> None:
        print(f"{time.monotonic():.2f} {number.name} to {process.pid}", file=sys.stderr)
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def in_memory() -> set[Path]:
    """Return the files in memory-backed storage."""
    return set(_MEMORY.iterdir()) if _MEMORY.exists() else set()


def leaked(before: set[Path]) -> list[Path]:
    """Return what the training left in memory: new files that no live process has open."""
    new = in_memory() - before
    held = set(_held()) if new else set()
    return sorted(new - held)


def _held() -> Iterator[Path]:
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                with suppress(OSError):
                    yield Path(os.readlink(link))
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                yield Path(line.split(maxsplit=5)[-1])


def verdict(run: Run, total: int, ranks: int, before: set[Path]) -> list[str]:
    """Return what is wrong; an empty list if all is well."""
    wrong = []
    code = run.process.poll()
    if code != 0:
        wrong.append(f"the exit code is {code}")
    wrong += step_log.mistakes(run.lines(), total, ranks)
    finals = {rank: run.folder / f"final-{rank}.json" for rank in range(ranks)}
    wrong += [f"rank {rank} has not finished" for rank, path in finals.items() if not path.exists()]
    ends = {rank: json.loads(path.read_text()) for rank, path in finals.items() if path.exists()}
    for rank, end in ends.items():
        wrong += [f"rank {rank} counts {end[what]} {what}" for what in ("step", "updates") if end[what] != total]
    hashes = {rank: end["hash"] for rank, end in ends.items()}
    if len(set(hashes.values())) > 1:
        wrong.append(f"the ranks' states differ at the end: {hashes}")
    # The last processes may be about to end.
    deadline = time.monotonic() + 3
    while (run.survivors() or leaked(before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    wrong += [f"process {process.pid} is left" for process in run.survivors()]
    wrong += [f"{path} is left in memory" for path in leaked(before)]
    return wrong


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the training, kill workers, and check the result."""
    before, total = in_memory(), steps(options)
    with Run(command(options, folder), folder, kills.environment()) as run:
        if not run.wait_until(lambda: run.all_at(5, options.ranks), _START_LIMIT, poll=0.05):
            raise RuntimeError(f"the training does not start:\n{run.output[-2000:]}")
        killer, began = Killer(run, options.ranks, options.seed), time.monotonic()
        while time.monotonic() - began < options.seconds and run.process.poll() is None:
            killer.strike(options.every)
        limit = 3 * options.seconds + 120

        def is_over() -> bool:
            run.workers()
            return run.process.poll() is not None

        if not run.wait_until(is_over, limit, poll=0.2):
            steps_made = run.steps()
            wrong = [
                f"it hangs, or takes longer than {limit:.0f} s more; the ranks are at {steps_made} of {total} steps"
            ]
        else:
            wrong = verdict(run, total, options.ranks, before)
        took, output, lines = time.monotonic() - began, run.output, run.lines()
    found = {"mistakes": wrong, "struck": dict(killer.counts), "seconds": took, "steps": total}
    found["outages"] = output.count(" workers are there again")
    found["processes"] = len({line.pid for line in lines})
    if wrong:
        print(output[-6000:], file=sys.stderr)
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=300, help="seconds in which workers are killed (default 300)")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--every", type=float, default=5, help="seconds between two kills, on average (default 5)")
    parser.add_argument("--epoch-steps", type=int, default=200, help="validate every N steps; 0 for never")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds of each step in which a worker only waits")
    parser.add_argument("--on-failure", default="cover", help="what survivors do (default cover)")
    parser.add_argument("--seed", type=int, default=0)
    report.add_places(parser)
    return parser.parse_args()


def main() -> int:
    """Run the soak test; return the exit code."""
    options = _options()
    with report.scratch(options.dir) as folder:
        found = soak(options, folder.resolve() / "run")
    struck = ", ".join(f"{count} x {kind}" for kind, count in found["struck"].items())
    rows = [["struck", struck], *([key, str(found[key])] for key in ("outages", "processes", "steps"))]
    rows += [["seconds", f"{found['seconds']:.0f}"], *(["WRONG", mistake] for mistake in found["mistakes"])]
    report.show(f"{options.ranks} ranks, seed {options.seed}", ["", ""], rows, [])
    settings = {key: value for key, value in vars(options).items() if key not in ("json", "dir")}
    report.write(options.json, {**found, "wrong": len(found["mistakes"]), "settings": settings}, [])
    return 1 if found["mistakes"] else 0


if __name__ == "__main__":
    sys.exit(main())
