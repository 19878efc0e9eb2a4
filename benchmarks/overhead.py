"""What ``scar_ddp`` adds to a step without failures: ``python -m benchmarks.overhead --json OUT``.

Two groups of two processes run at the same time, one with ``ddp``, one with ``scar_ddp``. They take turns in short
stretches of steps; a group without a turn is stopped, including its supervisor. ``ratio`` is the median, over pairs of
neighbouring stretches, of the median step with ``scar_ddp`` over the median step with ``ddp``, with its 95 % bootstrap
interval; ``mean_ratio`` is the same with mean steps, in which noise counts fully. ``floor_ratio`` compares one group
with itself: the resolution of the measurement. ``own_us`` is the time of the strategy's own code in a step. Two more
groups run the same model in a plain loop, with torch's DDP and with torchft's, also in turn.
"""

import argparse
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import psutil
from torch.distributed.elastic.utils.distributed import get_free_port

from benchmarks import kills, report, torchft_peer
from benchmarks.gate import LAYERS, Keeper
from benchmarks.kills import Run
from benchmarks.report import Target, median

RANKS = 2
#: Units of a layer, by the name of the model.
WIDTHS = {"5m": 1000, "20m": 2000}
_TINY = {"tiny": 64}
#: Steps at the beginning of a stretch that do not count: caches are cold.
_COLD = 3
_START_LIMIT, _LIMIT = 180.0, 120.0


@dataclass
class Group:
    """Processes that take turns with others.

    Args:
        name: Its name in the workers' store.
        runs: Its trainings.
        is_stopped_between: Whether the processes are stopped while others have their turn.

    """

    name: str
    runs: list[Run]
    is_stopped_between: bool
    steps: list[list[float]] = field(default_factory=list)
    own: list[list[float]] = field(default_factory=list)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""
        for run in self.runs:
            run.workers()
            for process in run.survivors():
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def output(self) -> str:
        """Return its last output."""
        return "\n".join(run.output[-2000:] for run in self.runs)

    def has_ended(self) -> bool:
        """Return whether a process has ended that should be running."""
        return any(run.process.poll() is not None for run in self.runs)


def wait_for(group: Group, condition: Callable[[], bool], limit: float) -> None:
    """Wait for a group.

    Raises:
        RuntimeError: If it ends, or takes too long.

    """
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline or group.has_ended():
            raise RuntimeError(f"the processes of {group.name} hang:\n{group.output()}")
        time.sleep(0.005)


@contextmanager
def lightning_groups(keeper: Keeper, width: int, folder: Path) -> Iterator[list[Group]]:
    """Start both trainings with Lightning."""
    module = "benchmarks.overhead_training"
    arguments = ["--store", keeper.address, "--width", str(width)]
    with ExitStack() as stack:
        run = [sys.executable, "-m", "lightning_scar", "run", "--nproc-per-node", str(RANKS), "-m", module]
        scar = Run([*run, "--strategy", "scar_ddp", *arguments], folder / "scar_ddp", kills.environment())
        runs = [stack.enter_context(scar)]
        plain = [sys.executable, "-m", module, "--strategy", "ddp", *arguments]
        port = str(get_free_port())  # type: ignore[no-untyped-call]
        ddp = [
            stack.enter_context(Run(plain, folder / f"ddp-{rank}", _torchrun_environment(rank, port)))
            for rank in range(RANKS)
        ]
        yield [Group("ddp", ddp, True), Group("scar_ddp", runs, True)]


def _torchrun_environment(rank: int, port: str) -> dict[str, str]:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "GROUP_RANK": 0}
    numbers = {name: str(value) for name, value in ranks.items()}
    return kills.environment(**numbers, TORCHELASTIC_RUN_ID="overhead", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


@contextmanager
def loop_groups(program: str, keeper: Keeper, width: int, folder: Path) -> Iterator[list[Group]]:
    """Start both plain loops. They are not stopped between turns: torchft would count them as dead."""
    with ExitStack() as stack:
        lighthouse = stack.enter_context(torchft_peer.lighthouse(program, folder / "lighthouse", 60.0))
        groups = []
        for kind in ("plain", "torchft"):
            more = ("--kind", kind, "--width", str(width), "--store", keeper.address, "--lighthouse", lighthouse)
            commands = [torchft_peer.command(program, *more, "--rank", str(rank)) for rank in range(RANKS)]
            runs = [Run(one, folder / f"{kind}-{i}", kills.environment()) for i, one in enumerate(commands)]
            groups.append(Group(kind, [stack.enter_context(run) for run in runs], False))
        yield groups


def prepare(keeper: Keeper, pair: Sequence[Group]) -> None:
    """Wait until both groups are ready, and stop them."""
    for group in pair:
        wait_for(group, lambda group=group: keeper.is_ready(group.name), _START_LIMIT)  # type: ignore[misc]
        if group.is_stopped_between:
            group.send(signal.SIGSTOP)


def take_turns(keeper: Keeper, pairs: Sequence[list[Group]], rounds: int, steps: int) -> None:
    """Run rounds in which every group of every pair has a turn; the first round does not count."""
    for turn in range(rounds + 1):
        for pair in pairs:
            for group in pair if turn % 2 else reversed(pair):
                _one_turn(keeper, group, steps + _COLD, turn > 0)


def _one_turn(keeper: Keeper, group: Group, steps: int, counts: bool) -> None:
    if group.is_stopped_between:
        group.send(signal.SIGCONT)
    keeper.go(group.name, steps)
    wait_for(group, lambda: keeper.is_done(group.name), _LIMIT)
    if group.is_stopped_between:
        group.send(signal.SIGSTOP)
    if not counts:
        return
    measured = keeper.measured(group.name)
    # All ranks end a step together, except for the update; the slowest counts.
    ends = [max(times) for times in zip(*(rank["times"] for rank in measured), strict=True)][_COLD:]
    group.steps.append([b - a for a, b in pairwise(ends)])
    if any(rank["notes"] for rank in measured):
        group.own = group.own or [[] for _ in measured]
        for own, rank in zip(group.own, measured, strict=True):
            own += rank["notes"][_COLD:]


def finish(keeper: Keeper, pairs: Sequence[list[Group]]) -> None:
    """End all groups in order."""
    for group in (group for pair in pairs for group in pair):
        if group.is_stopped_between:
            group.send(signal.SIGCONT)
        keeper.go(group.name, 0)
        with suppress(psutil.TimeoutExpired, RuntimeError):
            for run in group.runs:
                run.wait_until(lambda: False, 10, poll=0.05)


def ratios(one: Sequence[list[float]], other: Sequence[list[float]], of: Callable[[list[float]], float]) -> list[float]:
    """Return the ratio of each stretch to its neighbour of the other kind."""
    return [of(a) / of(b) for a, b in zip(one, other, strict=True)]


def interval(samples: Sequence[float]) -> list[float]:
    """Return the 95 % bootstrap interval of the samples' median."""
    chance = random.Random(0)
    medians = sorted(median(chance.choices(samples, k=len(samples))) for _ in range(2000))
    return [medians[50], medians[1949]]


def compared(name: str, group: Group, base: Group) -> dict[str, Any]:
    """Return the figures of one group relative to another."""
    by_median = ratios(group.steps, base.steps, statistics.median)
    means = ratios(group.steps, base.steps, statistics.mean)
    return {
        f"{name}ratio": median(by_median),
        f"{name}ratio_interval": interval(by_median),
        f"{name}mean_ratio": median(means),
        f"{name}mean_ratio_interval": interval(means),
    }


def figures(groups: Mapping[str, Group]) -> dict[str, Any]:
    """Return the figures of one model."""
    found: dict[str, Any] = {f"{name}_step_s": median([*chain(*group.steps)]) for name, group in groups.items()}
    ddp, scar = groups["ddp"], groups["scar_ddp"]
    found |= compared("", scar, ddp)
    # Two stretches of one group are twice as far apart in time as neighbours.
    even, odd = Group("ddp", [], True, ddp.steps[::2]), Group("ddp", [], True, ddp.steps[1::2])
    pairs = min(len(even.steps), len(odd.steps))
    even.steps, odd.steps = even.steps[:pairs], odd.steps[:pairs]
    found |= compared("floor_", odd, even)
    found["own_us_by_rank"] = [1e6 * median(own) for own in scar.own]
    found["own_mean_us_by_rank"] = [1e6 * statistics.mean(own) for own in scar.own]
    found["own_us"] = max(found["own_us_by_rank"])
    if "torchft" in groups:
        found |= compared("torchft_", groups["torchft"], groups["plain"])
    found["samples"] = {name: [median(stretch) for stretch in group.steps] for name, group in groups.items()}
    return found


def measure(width: int, folder: Path, rounds: int, steps: int, program: str | None) -> dict[str, Any]:
    """Measure one model.

    Args:
        width: Units of a layer.
        folder: A scratch folder.
        rounds: Stretches of each group.
        steps: Steps of a stretch.
        program: The Python that has torchft, if any.

    """
    keeper = Keeper(RANKS)
    with ExitStack() as stack:
        pairs = [stack.enter_context(lightning_groups(keeper, width, folder))]
        prepare(keeper, pairs[0])
        if program is not None:
            try:
                pairs.append(stack.enter_context(loop_groups(program, keeper, width, folder)))
                prepare(keeper, pairs[1])
            except RuntimeError as error:
                print(f"torchft does not start and is left out: {error}", file=sys.stderr)
                del pairs[1:]
        take_turns(keeper, pairs, rounds, steps)
        finish(keeper, pairs)
    found = figures({group.name: group for pair in pairs for group in pair})
    return {**found, "parameters": LAYERS * (width * width + width)}


def _rows(found: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    table = []
    for name, one in found.items():
        for what, title in (("", "scar_ddp over ddp"), ("floor_", "ddp over itself"), ("torchft_", "torchft over DDP")):
            if f"{what}ratio" in one:
                low, high = one[f"{what}ratio_interval"]
                own = "" if what else f"{one['own_us']:.0f}"
                step = one[{"": "scar_ddp_step_s", "floor_": "ddp_step_s", "torchft_": "torchft_step_s"}[what]]
                cells = [f"{1000 * step:.1f}", f"{one[f'{what}ratio']:.4f}", f"{low:.4f} to {high:.4f}"]
                table.append([name, title, *cells, f"{one[f'{what}mean_ratio']:.4f}", own])
    return table


def _options() -> argparse.Namespace:
    parser = report.arguments((__doc__ or "").split("\n")[0], rounds=40)
    parser.add_argument("--steps", type=int, default=20, help="steps of a stretch that count (default 20)")
    torchft_peer.add_argument(parser)
    return parser.parse_args()


def main() -> None:
    """Measure, print and write JSON."""
    options = _options()
    rounds = options.rounds or (4 if options.quick else 40)
    program = torchft_peer.python(options.torchft)
    with report.scratch(options.dir) as folder:
        found = {
            name: measure(width, folder.resolve() / name, rounds, options.steps, program)
            for name, width in (_TINY if options.quick else WIDTHS).items()
        }
    flat: dict[str, Any] = {f"{name}_{key}": value for name, one in found.items() for key, value in one.items()}
    flat["settings"] = {"rounds": rounds, "steps": options.steps, "ranks": RANKS, "threads_per_rank": 1}
    aims = [
        target
        for name in found
        for target in (
            Target(f"{name}_ratio", flat[f"{name}_ratio"], 1.02),
            Target(f"{name}_own_us", flat[f"{name}_own_us"], 200),
        )
    ]
    columns = ["model", "", "step ms", "ratio", "95 %", "of means", "own us"]
    report.show(f"a step of {RANKS} ranks without failures", columns, _rows(found), [] if options.quick else aims)
    report.write(options.json, flat, [] if options.quick else aims)


if __name__ == "__main__":
    main()
