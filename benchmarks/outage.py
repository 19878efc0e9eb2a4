"""What the death of a worker costs: ``python -m benchmarks.outage --json OUT``.

One of three ranks is killed by SIGKILL at a random moment, every other time while gradients are being reduced. From the
lines that workers log after each step follow the time to the others' next step (``survivors_s``), the time until all
ranks step together (``rejoined_s``), the number of repeated steps (``redone``) and how often training hangs (``hung``).
For comparison: the start-up of the same script alone, and the same figures for torchrun with a ModelCheckpoint and for
torchft.

``cover`` and ``shrink`` go on without it. Its steps have dropout, so whole batches of the missing worker are dealt out.

``spare`` is ``shrink`` with a replacement that waits; ``fresh`` is ``shrink`` with replacements that are programs of
their own, not forks of a process that has imported torch and Lightning. With it the start of four workers is measured,
forked and not.

``backup`` loses more: a host with its supervisor, its worker and its memory, while the optimizer's state is sharded.
All workers restart, and the lost part is read from the memory of the next host.

In one run of ``scar_ddp`` each rank is killed only once: the supervisor waits before it replaces a worker that died
young twice.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import kills, report, step_log, torchft_peer
from benchmarks.found import Found
from benchmarks.kills import Run
from benchmarks.lost_hosts import LostHosts
from benchmarks.report import Target, median
from benchmarks.step_log import Kill

RANKS = 3
#: Seconds for a start, and for all ranks to step together again; after that a run counts as hung.
_START_LIMIT, _LIMIT = 180.0, 120.0
#: Steps before the first kill, and between a recovery and what comes next.
_CALM = 10
_TRAINING = [sys.executable, "-m", "benchmarks.elastic_training"]
#: Options of `lightning-scar run` for ways that a script does not choose itself.
_SUPERVISED = {"spare": ["--spares", "1"], "fresh": ["--fresh"]}
#: Workers of the start that is measured.
_STARTED = 4
#: So small that survivors leave the cores to the replacement: an accelerator computes for most of a step.
_SIZE = ["--width", "256", "--pause", "0.05"]


def command(method: str, folder: Path) -> list[str]:
    """Return the command that starts a training.

    Args:
        method: A value of ``on_failure``, ``"spare"``, ``"fresh"``, ``"torchrun"``, ``"backup"``, or ``"bare"`` for one
            worker alone.
        folder: Where its workers write.

    """
    own = ["--folder", str(folder), "--ranks", str(RANKS), *_SIZE]
    if method == "bare":
        return [*_TRAINING, "--folder", str(folder), "--ranks", "1", "--strategy", "auto", *_SIZE]
    if method == "torchrun":
        run = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "--max-restarts", "1000"]
        how = ["--strategy", "ddp", "--checkpoint-every", "20"]
        return [sys.executable, "-m", *run, "-m", "benchmarks.elastic_training", *own, *how]
    if method == "backup":
        return ["-m", "benchmarks.elastic_training", *own, "--nodes", str(RANKS), "--sharded", "--memory-every", "1"]
    if method in _SUPERVISED:
        return _supervised(RANKS, _SUPERVISED[method], own)
    return [*_TRAINING, *own, "--on-failure", method]


def _supervised(ranks: int, options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    run = [sys.executable, "-m", "lightning_scar", "run", "--nproc-per-node", str(ranks), "--max-restarts", "1000"]
    return [*run, *options, "-m", "benchmarks.elastic_training", *arguments]


def _start(method: str, folder: Path) -> Run:
    environment = kills.environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    if method == "backup":
        return LostHosts(command(method, folder), folder, environment, hosts=RANKS)
    return Run(command(method, folder), folder, environment)


def startup(folder: Path) -> float:
    """Return the seconds that a single worker takes from its start to the end of its first step."""
    with Run(command("bare", folder), folder, kills.environment()) as run:
        if not run.wait_until(lambda: run.all_at(2, 1), _START_LIMIT):
            raise RuntimeError(f"a training of one worker does not start:\n{run.output[-2000:]}")
        return run.lines()[0].time - run.started


def start_of_all(folder: Path, options: Sequence[str]) -> float:
    """Return the seconds from the start of a job of four workers to the end of the last one's first step.

    Args:
        folder: Where its workers write.
        options: Those of ``lightning-scar run``.

    """
    own = ["--folder", str(folder), "--ranks", str(_STARTED), *_SIZE]
    with Run(_supervised(_STARTED, options, own), folder, kills.environment()) as run:
        if not run.wait_until(lambda: run.all_at(1, _STARTED), _START_LIMIT):
            raise RuntimeError(f"a training of {_STARTED} workers does not start:\n{run.output[-2000:]}")
        return max(line.time for line in run.lines() if line.step == 1) - run.started


def _plan(count: int, ranks: Sequence[int], chance: random.Random) -> Iterator[list[tuple[int, bool]]]:
    """Yield the ranks to kill in each run, each once, and whether in a collective."""
    done = 0
    while done < count:
        victims = chance.sample(ranks, len(ranks))[: count - done]
        yield [(rank, (done + i) % 2 == 1) for i, rank in enumerate(victims)]
        done += len(victims)


def kill_all(
    method: str, folder: Path, victims: Sequence[tuple[int, bool]], chance: random.Random, beside: bool = False
) -> Found:
    """Run one training and kill its workers one after the other.

    Args:
        method: As in :func:`command`.
        folder: Where its workers write.
        victims: Which ranks, and whether in a collective.
        chance: Chooses the moments.
        beside: Whether to start a separate worker first, while the others train.

    """
    found = Found()
    with _start(method, folder) as run:
        if not run.wait_until(lambda: run.all_at(_CALM, RANKS), _START_LIMIT, poll=0.05):
            raise RuntimeError(f"a training by {method} does not start:\n{run.output[-2000:]}")
        if beside:
            found.startups_beside.append(startup(folder / "beside"))
        for rank, in_collective in victims:
            time.sleep(chance.uniform(0.3, 1.5))
            kill = run.kill(rank, in_collective)
            if kill is None or not _follow(run, kill):
                found.hung += 1
                print(f"{method}: rank {rank} killed, the training hangs:\n{run.output[-3000:]}", file=sys.stderr)
                break
        found.kills = run.kills
        lines = run.lines()
    ends = [kill.time for kill in run.kills[1:]] + [float("inf")]
    for kill, end in zip(run.kills, ends, strict=True):
        found.recoveries.append(step_log.recovery([line for line in lines if line.time < end], kill, RANKS))
    found.redone.append(step_log.redone(lines))
    return found


def _follow(run: Run, kill: Kill) -> bool:
    """Wait until all ranks step together again; return whether they do."""

    def is_over() -> bool:
        return step_log.recovery(run.lines(), kill, RANKS).rejoined_s is not None

    if not run.wait_until(is_over, _LIMIT, poll=0.05):
        return False
    goal = max(run.steps().values()) + _CALM
    return run.wait_until(lambda: run.all_at(goal, RANKS), _LIMIT, poll=0.05)


def measure(folder: Path, methods: dict[str, int], seed: int) -> tuple[dict[str, Found], list[float]]:
    """Measure all methods in turn, and start-ups between their runs.

    Args:
        folder: A scratch folder.
        methods: The number of kills of each method.
        seed: The seed of victims and moments.

    Returns:
        The results of each method, and the start-ups of a worker alone.

    """
    found = {name: Found() for name in methods}
    chance = random.Random(seed)
    # Losing the host of rank 0 would end the job.
    ranks = {name: range(name == "backup", RANKS) for name in methods}
    plans = {name: list(_plan(count, ranks[name], chance)) for name, count in methods.items()}
    startups = [startup(folder / "bare-0")]
    for turn in range(max(map(len, plans.values()), default=0)):
        for name, plan in plans.items():
            if turn < len(plan):
                here = kill_all(name, folder / f"{name}-{turn}", plan[turn], chance, beside=turn < 3 and len(plan) > 1)
                for what, more in vars(here).items():
                    setattr(found[name], what, getattr(found[name], what) + more)
        startups.append(startup(folder / f"bare-{turn + 1}"))
    return found, startups


def targets(found: dict[str, Any]) -> list[Target]:
    """Return the targets."""
    return [
        Target("shrink_survivors_s", found["shrink_survivors_s"], 0.2),
        Target("shrink_survivors_most_s", found["shrink_survivors_most_s"], 0.3),
        Target("shrink_rejoined_s", found["shrink_rejoined_s"], 0.8),
        Target("shrink_rejoined_most_s", found["shrink_rejoined_most_s"], 1.5),
        Target("shrink_redone", found["shrink_redone"], 0),
        Target("shrink_hung", found["shrink_hung"], 0),
        *([Target("spare_rejoined_s", found["spare_rejoined_s"], 0.5)] if "spare_kills" in found else []),
    ]


def _rows(found: dict[str, Any], names: Sequence[str]) -> list[list[str]]:
    times = ("survivors_s", "survivors_most_s", "rejoined_s", "rejoined_most_s", "pause_s")
    counts = ("redone", "hung", "kills")
    return [
        [
            name,
            *(f"{found[f'{name}_{what}']:.2f}" for what in times),
            *(str(found[f"{name}_{what}"]) for what in counts),
        ]
        for name in names
        if f"{name}_kills" in found
    ]


def collected(found: dict[str, Found], startups: list[float]) -> dict[str, Any]:
    """Return all figures, and the samples."""
    figures: dict[str, Any] = {"startup_s": median(startups)}
    for name, method in found.items():
        figures |= method.figures(name)
    figures["samples"] = {"startup_s": startups} | {name: asdict(method) for name, method in found.items()}
    return figures


def _options() -> argparse.Namespace:
    parser = report.arguments((__doc__ or "").split("\n")[0], rounds=21)
    parser.add_argument("--seed", type=int, default=0, help="seed of victims and moments")
    methods = "cover,shrink,spare,fresh,buffer,wait,backup,torchrun,torchft"
    parser.add_argument("--methods", default=methods, help="those to measure, comma-separated")
    torchft_peer.add_argument(parser)
    return parser.parse_args()


def main() -> None:
    """Measure, print and write JSON."""
    options = _options()
    count = options.rounds or (2 if options.quick else 21)
    names = options.methods.split(",")
    # Fewer kills of peers and other ways: they have no targets.
    few = min(count, 9)
    methods = {name: count if name in ("cover", "shrink", "spare") else few for name in names if name != "torchft"}
    starts: dict[str, list[float]] = {}
    with report.scratch(options.dir) as folder:
        found, startups = measure(folder.resolve(), methods, options.seed)
        if "torchft" in names:
            found |= torchft_peer.kill_some(folder.resolve(), options.torchft, few, options.seed)
        for name, how in (("", []), ("_fresh", ["--fresh"])) if "fresh" in names else ():
            runs = [folder.resolve() / f"all{name}-{i}" for i in range(few)]
            starts[f"start_of_{_STARTED}{name}_s"] = [start_of_all(each, how) for each in runs]
    figures = collected(found, startups) | {name: median(seconds) for name, seconds in starts.items()}
    figures["samples"] |= starts
    figures["settings"] = {"seed": options.seed, "ranks": RANKS, "kills": count}
    title = f"one of {RANKS} ranks killed; a worker alone starts in {figures['startup_s']:.2f} s"
    columns = ["method", "survivors s", "at most", "rejoined s", "at most", "pause s", "redone", "hung", "kills"]
    aims = targets(figures) if "shrink" in names and not options.quick else []
    report.show(title, columns, _rows(figures, names), aims)
    for name in starts:
        print(f"{name}: {figures[name]:.2f}")
    report.write(options.json, figures, aims)


if __name__ == "__main__":
    main()
