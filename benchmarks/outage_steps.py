"""How long a step takes while a worker is missing: ``python -m benchmarks.outage_steps --json OUT``.

One worker of a group is killed, and its replacement takes some seconds more to start, so that the others make many
steps without it. On each survivor the median of these, after the first two, is divided by that of the steps before the
kill. With N workers of which M are left, ``cover`` should take N / M times as long, as each step has the same samples.

- ``compute_3``: one of three workers. Where there are fewer processors than workers they share them before the kill, so
  that wall-clock time says little. What counts is each worker's own processor time.
- ``compute_2``: one of two workers. Wall-clock time counts where there are two processors.
- ``pause_3``: a worker waits through most of a step, for as long as its samples take, as for an accelerator.

The peak of a survivor's memory before the kill and at the end of the outage is compared, too.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import kills, report
from benchmarks.kills import Run
from benchmarks.report import Target, median
from benchmarks.step_log import Kill, Line

METHODS = ("cover", "shrink")
_START_LIMIT = 180.0
#: Steps whose time is not counted: the first ones of the training, and after a kill the interrupted one and the next.
_FIRST, _INTERRUPTED = 3, 2
#: What a covered step may cost, relative to its samples.
_LIMIT = 1.15


class Setting(NamedTuple):
    """A training.

    Attributes:
        ranks: Its workers.
        options: Of ``benchmarks.elastic_training``.
        clock: What counts: ``"wall"`` or ``"cpu"``.

    """

    ranks: int
    options: Sequence[str]
    clock: str


_COMPUTE = ("--width", "2048", "--batch-size", "512", "--pause", "0")
SETTINGS = {
    "compute_3": Setting(3, _COMPUTE, "cpu"),
    "compute_2": Setting(2, _COMPUTE, "wall"),
    "pause_3": Setting(3, ("--width", "256", "--batch-size", "32", "--pause", "0.3"), "wall"),
}
_QUICK = {"pause_3": Setting(3, ("--width", "64", "--batch-size", "16", "--pause", "0.05"), "wall")}


class Steps(NamedTuple):
    """What a survivor's step takes, before the kill and during the outage.

    Attributes:
        wall: Seconds.
        cpu: Seconds of its process on a processor.
        peak: Its largest resident memory so far, in MB.

    """

    wall: tuple[float, float]
    cpu: tuple[float, float]
    peak: tuple[float, float]

    def ratio(self, clock: str) -> float:
        """Return how many times longer a step takes during the outage."""
        before, during = self.wall if clock == "wall" else self.cpu
        return during / before


def peak(pid: int) -> float:
    """Return the largest resident memory that a process has had, in MB; NaN where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM:")), float("nan"))


def step_times(lines: Sequence[Line], kill: Kill, pid: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the median wall-clock and processor time of a survivor's steps.

    Args:
        lines: Those of all workers.
        kill: The kill.
        pid: The survivor.

    Returns:
        Seconds of wall-clock time, then of processor time, each before the kill and until the replacement's first step.

    """
    joined = next((line.time for line in lines if line.rank == kill.rank and line.time > kill.time), float("inf"))
    own = [line for line in lines if line.pid == pid]
    before = [line for line in own if line.time < kill.time][_FIRST:]
    during = [line for line in own if kill.time < line.time < joined][_INTERRUPTED:]
    found = []
    for which in ("time", "cpu"):
        pairs = ([getattr(b, which) - getattr(a, which) for a, b in pairwise(part)] for part in (before, during))
        found.append(tuple(map(median, pairs)))
    (wall, cpu) = found
    return (wall[0], wall[1]), (cpu[0], cpu[1])


def outage(method: str, setting: Setting, folder: Path, seconds: float, victim: int) -> list[Steps]:
    """Run one training, and kill one of its workers.

    Args:
        method: A value of ``on_failure``.
        setting: The training.
        folder: Where its workers write.
        seconds: How long to watch its steps before the kill, and how much longer the replacement takes to start.
        victim: The rank to kill.

    Returns:
        What its survivors' steps take.

    """
    own = ["--folder", str(folder), "--ranks", str(setting.ranks), "--on-failure", method, *setting.options]
    # Slices of batches need a training without random numbers. With few steps it takes no time to shuffle an epoch.
    own += ["--optimizer", "sgd", "--dropout", "0", "--epoch-steps", "400", "--startup", str(seconds)]
    with Run([sys.executable, "-m", "benchmarks.elastic_training", *own], folder, kills.environment()) as run:
        if not run.wait_until(lambda: run.all_at(_FIRST, setting.ranks), _START_LIMIT, poll=0.1):
            raise RuntimeError(f"a training by {method} does not start:\n{run.output[-2000:]}")
        time.sleep(seconds)
        pids = [worker.pid for rank, worker in run.workers().items() if rank != victim]
        before = [peak(pid) for pid in pids]
        kill = run.kill(victim)
        if kill is None:
            raise RuntimeError(f"there is no rank {victim} to kill ({method})")

        def is_over() -> bool:
            return any(line.rank == victim and line.time > kill.time for line in run.lines())

        if not run.wait_until(is_over, seconds + _START_LIMIT, poll=0.1):
            raise RuntimeError(f"no replacement joins ({method}):\n{run.output[-2000:]}")
        after = [peak(pid) for pid in pids]
        lines = run.lines()
    return [
        Steps(*step_times(lines, kill, pid), (earlier, later))
        for pid, earlier, later in zip(pids, before, after, strict=True)
    ]


def measure(
    folder: Path, methods: Sequence[str], settings: dict[str, Setting], rounds: int, seconds: float
) -> dict[str, Any]:
    """Measure all methods in all settings, in turn.

    Args:
        folder: A scratch folder.
        methods: Values of ``on_failure``.
        settings: By name.
        rounds: How often.
        seconds: As in :func:`outage`.

    Returns:
        Flat: medians and ratios of each method in each setting. Nested: the samples.

    """
    chance = random.Random(0)
    samples: dict[str, list[Steps]] = {f"{name}_{method}": [] for name in settings for method in methods}
    for turn in range(rounds):
        for name, setting in settings.items():
            for method in methods if turn % 2 == 0 else reversed(methods):
                victim = chance.randrange(setting.ranks)
                key = f"{name}_{method}"
                samples[key] += outage(method, setting, folder / f"{key}-{turn}", seconds, victim)
                report.progress(f"{key}: ratio {samples[key][-1].ratio(setting.clock):.2f}")
    found: dict[str, Any] = {}
    for key, all_of_them in samples.items():
        for clock in ("wall", "cpu"):
            pairs = [getattr(one, clock) for one in all_of_them]
            found[f"{key}_{clock}_before_s"] = median([before for before, _ in pairs])
            found[f"{key}_{clock}_during_s"] = median([during for _, during in pairs])
            found[f"{key}_{clock}_ratio"] = median([one.ratio(clock) for one in all_of_them])
        found[f"{key}_peak_mb"] = median([one.peak[0] for one in all_of_them])
        found[f"{key}_more_mb"] = median([one.peak[1] - one.peak[0] for one in all_of_them])
    return {**found, "samples": {key: [one._asdict() for one in steps] for key, steps in samples.items()}}


def targets(found: dict[str, Any], settings: dict[str, Setting]) -> list[Target]:
    """Return what a covered step may cost: its samples' share, and a little more."""
    return [
        Target(key, found[key], _LIMIT * setting.ranks / (setting.ranks - 1))
        for name, setting in settings.items()
        if (key := f"{name}_cover_{setting.clock}_ratio") in found
    ]


def _rows(found: dict[str, Any], methods: Sequence[str], settings: dict[str, Setting]) -> list[list[str]]:
    rows = []
    for name, setting in settings.items():
        for method in methods:
            key = f"{name}_{method}"
            times = [f"{found[f'{key}_{clock}_{which}']:.3f}" for clock in ("wall", "cpu") for which in _COLUMNS]
            share = setting.ranks / (setting.ranks - 1) if method == "cover" else 1
            memory = [f"{found[f'{key}_{which}_mb']:.0f}" for which in ("peak", "more")]
            rows.append([name, method, *times, f"{share:.2f}", setting.clock, *memory])
    return rows


_COLUMNS = ("before_s", "during_s", "ratio")


def main() -> None:
    """Measure, print and write JSON."""
    parser = report.arguments((__doc__ or "").split("\n")[0], rounds=3)
    parser.add_argument("--methods", default=",".join(METHODS), help="values of on_failure, comma-separated")
    parser.add_argument("--seconds", type=float, default=8, help="of steps before and during the outage (default 8)")
    options: argparse.Namespace = parser.parse_args()
    settings, methods = _QUICK if options.quick else SETTINGS, options.methods.split(",")
    rounds, seconds = options.rounds or (1 if options.quick else 3), 1.5 if options.quick else options.seconds
    with report.scratch(options.dir) as folder:
        found = measure(folder.resolve(), methods, settings, rounds, seconds)
    found["settings"] = {"rounds": rounds, "seconds": seconds, **{n: s._asdict() for n, s in settings.items()}}
    aims = [] if options.quick else targets(found, settings)
    heads = ["wall before, s", "during", "ratio", "cpu before, s", "during", "ratio", "samples", "counts"]
    columns = ["training", "method", *heads, "peak, MB", "more during"]
    report.show("a step with and without one worker", columns, _rows(found, methods, settings), aims)
    report.write(options.json, found, aims)


if __name__ == "__main__":
    main()
