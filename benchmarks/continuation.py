"""Which ``on_failure`` loses least in an outage: ``python -m benchmarks.continuation --json OUT --plot PNG``.

The question of 'Training Through Failure' (2024), by real runs: three ranks train on handwritten digits, rank 1 is
killed by SIGKILL at a fixed moment, and the loss on held-out digits is followed over wall-clock time, and over steps.
The ways: no failure, ``wait``, ``buffer`` with its stale gradients applied as one mean step or replayed one by one,
``shrink``, ``cover``, and a restart of all ranks from a checkpoint by torchrun. Every way runs once with every seed, in
turn. With ``--startup`` replacements take longer to start, as where a script has much to load, and outages are longer.

The weights of rank 0 are written every few steps, and the loss is computed after the run, so that measuring costs every
way the same.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks import continuation_plot, elastic_training, kills, report, step_log
from benchmarks.curve import Curve
from benchmarks.data import mnist
from benchmarks.kills import Run
from benchmarks.report import median

RANKS, VICTIM = 3, 1
WAYS = ("none", "wait", "buffer_mean", "buffer_replay", "shrink", "cover", "restart")
_START_LIMIT = 180.0
#: The training: slow enough that the loss still falls at the end, and without dropout, so that ``cover`` slices.
_TRAINING = ["--dropout", "0", "--optimizer", "sgd", "--learning-rate", "0.003", "--width", "128", "--snapshots", "5"]
_CHECKPOINT_EVERY = 50


def digits(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the training data, and return the held-out images and labels."""
    images, labels = mnist()
    held_out = torch.arange(len(labels)) % 10 == 0
    torch.save((images[~held_out], labels[~held_out]), path)
    return images[held_out], labels[held_out]


def command(way: str, folder: Path, data: Path, seed: int, options: argparse.Namespace) -> list[str]:
    """Return the command that starts a training."""
    own = ["--folder", str(folder), "--ranks", str(RANKS), "--data", str(data), "--seed", str(seed), *_TRAINING]
    own += ["--pause", str(options.pause), "--max-staleness", str(options.max_staleness)]
    own += ["--startup", str(options.startup)]
    module = ["-m", "benchmarks.elastic_training"]
    if way == "restart":
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "--max-restarts", "9"]
        return [sys.executable, *run, *module, *own, "--strategy", "ddp", "--checkpoint-every", str(_CHECKPOINT_EVERY)]
    policy, _, flush = ("shrink" if way == "none" else way).partition("_")
    return [sys.executable, *module, *own, "--on-failure", policy, "--flush", flush or "mean"]


def train(
    way: str, folder: Path, data: Path, seed: int, options: argparse.Namespace
) -> tuple[Run, float, float | None]:
    """Run one training, with its failure, for the given time.

    Returns:
        The run, the time of its first step, and the length of the outage.

    """
    environment = kills.environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    with Run(command(way, folder, data, seed, options), folder, environment) as run:
        if not run.wait_until(lambda: run.all_at(1, RANKS), _START_LIMIT):
            raise RuntimeError(f"the training ({way}) does not start:\n{run.output[-2000:]}")
        began = run.lines()[0].time
        if way != "none":
            time.sleep(max(began + options.kill_at - time.monotonic(), 0))
            if run.kill(VICTIM) is None:
                raise RuntimeError(f"there is no rank {VICTIM} to kill ({way})")
        # Poll rarely, as it takes CPU time.
        run.wait_until(lambda: time.monotonic() > began + options.seconds, options.seconds + 60, poll=0.5)
        if run.process.poll() is not None:
            raise RuntimeError(f"the training ({way}) ended too early:\n{run.output[-4000:]}")
    outage = None
    if run.kills:
        outage = step_log.recovery(run.lines(), run.kills[0], RANKS).rejoined_s
    return run, began, outage


def curve(run: Run, began: float, outage: float | None, held_out: tuple[torch.Tensor, torch.Tensor]) -> Curve:
    """Compute the losses of a run's snapshots."""
    model = elastic_training.Classifier(elastic_training.parser().parse_args(["--folder", "", *_TRAINING])).eval()
    found = []
    for path in run.folder.glob("snapshot-*.pt"):
        _, step, when = path.name.removesuffix(".pt").split("-")
        model.load_state_dict(torch.load(path))
        with torch.no_grad():
            loss = float(cross_entropy(model.layers(held_out[0]), held_out[1]))
        found.append((float(when) - began, int(step), loss))
    times, steps, losses = (list(column) for column in zip(*sorted(found), strict=True))
    printed = [line for line in run.output.splitlines() if "workers" in line and line.startswith("lightning-scar:")]
    return Curve(times, steps, losses, outage, printed)


def measure(folder: Path, seeds: int, options: argparse.Namespace) -> dict[str, list[Curve]]:
    """Measure all ways with all seeds, in turn.

    Returns:
        The curves of each way, one for each seed.

    """
    data = folder / "digits.pt"
    held_out = digits(data)
    found: dict[str, list[Curve]] = {way: [] for way in options.ways}
    for seed in range(seeds):
        for way in options.ways if seed % 2 == 0 else reversed(options.ways):
            run, began, outage = train(way, folder / f"{way}-{seed}", data, seed, options)
            found[way].append(curve(run, began, outage, held_out))
            print(f"seed {seed}, {way}: loss {found[way][-1].losses[-1]:.3f}", file=sys.stderr, flush=True)
    return found


def moments(options: argparse.Namespace) -> list[float]:
    """Return the times at which ways are compared, from shortly after the kill to the end."""
    left = options.seconds - options.kill_at
    return [options.kill_at + share * left for share in (0.1, 0.25, 0.5, 0.75, 1.0)]


def figures(curves: Mapping[str, Sequence[Curve]], options: argparse.Namespace) -> dict[str, Any]:
    """Return losses at equal times, times to equal losses, outages, and differences from no failure at equal steps."""
    whens = moments(options)
    goals = [float(np.mean([one.at(when) for one in curves["none"]])) for when in whens[1:4]]
    found: dict[str, Any] = {"moments_s": whens, "goals": goals}
    for way, runs in curves.items():
        found[f"{way}_losses"] = [float(np.mean([one.at(when) for one in runs])) for when in whens]
        found[f"{way}_losses_by_seed"] = [[one.at(when) for when in whens] for one in runs]
        found[f"{way}_reached_s"] = [median([one.reaches(goal) for one in runs]) for goal in goals]
        found[f"{way}_off"] = max(off(one, calm) for one, calm in zip(runs, curves["none"], strict=True))
        found[f"{way}_last_step"] = median([float(one.steps[-1]) for one in runs])
        found[f"{way}_outage_s"] = median([one.outage for one in runs if one.outage is not None])
    found["lower_than"] = {
        way: {other: _wins(curves[way], curves[other], whens) for other in curves if other != way} for way in curves
    }
    found["samples"] = {way: [vars(one) for one in runs] for way, runs in curves.items()}
    return found


def off(one: Curve, other: Curve) -> float:
    """Return the largest difference between the losses of two runs after equal numbers of steps."""
    ours, theirs = one.by_step(), other.by_step()
    return max((abs(ours[step] - theirs[step]) for step in ours.keys() & theirs.keys()), default=float("nan"))


def _wins(ours: Sequence[Curve], theirs: Sequence[Curve], whens: Sequence[float]) -> list[int]:
    """Count the seeds with which one way has the lower loss, at each moment."""
    return [sum(a.at(when) < b.at(when) for a, b in zip(ours, theirs, strict=True)) for when in whens]


def conclusion(found: Mapping[str, Any], seeds: int) -> list[str]:
    """Return sentences: which way is ahead, and whether stale gradients pay."""
    sentences = []
    failing = [way for way in found["lower_than"] if way != "none"]
    for i, when in enumerate(found["moments_s"]):
        order = sorted(failing, key=lambda way: found[f"{way}_losses"][i])
        losses = ", ".join(f"{way} {found[f'{way}_losses'][i]:.3f}" for way in order)
        sentences.append(f"at {when:.1f} s: {losses}; without a failure {found['none_losses'][i]:.3f}")
    for flush in ("buffer_mean", "buffer_replay"):
        for other in ("wait", "shrink", "cover"):
            wins = found["lower_than"].get(flush, {}).get(other)
            if wins is None:
                continue
            pays = "pays" if 2 * wins[-1] > seeds else "does not pay"
            sentences.append(
                f"{flush} {pays} against {other}: lower loss with {'/'.join(map(str, wins))} of {seeds} seeds"
            )
    return sentences


def _show(found: Mapping[str, Any], options: argparse.Namespace) -> None:
    losses = [f"at {when:.0f} s" for when in found["moments_s"]]
    reached = [f"s to {goal:.3f}" for goal in found["goals"]]
    title = f"held-out loss, rank {VICTIM} of {RANKS} killed at {options.kill_at:g} s"
    rows = [[way, *(f"{loss:.3f}" for loss in found[f"{way}_losses"])] for way in options.ways]
    report.show(title, ["way", *losses], rows, [])
    rows = []
    for way in options.ways:
        cells = [f"{seconds:.1f}" for seconds in found[f"{way}_reached_s"]]
        cells += [f"{found[f'{way}_last_step']:.0f}", f"{found[f'{way}_outage_s']:.1f}", f"{found[f'{way}_off']:.1g}"]
        rows.append([way, *cells])
    columns = ["way", *reached, "steps", "outage s", "off at equal steps"]
    report.show("how soon a loss is reached, and how far it is from no failure's", columns, rows, [])


def _options() -> argparse.Namespace:
    parser = report.arguments((__doc__ or "").split("\n")[0], rounds=5)
    parser.add_argument("--plot", metavar="PNG", type=Path, help="draw the losses over time and over steps")
    parser.add_argument("--seconds", type=float, default=40, help="of each run, from its first step (default 40)")
    parser.add_argument("--kill-at", type=float, default=8, help="seconds after the first step (default 8)")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds of each step in which a worker only waits")
    parser.add_argument("--startup", type=float, default=0, help="seconds more that a replacement takes to start")
    parser.add_argument("--max-staleness", type=int, default=16, help="maximum staleness of the buffer (default 16)")
    parser.add_argument(
        "--ways", type=lambda text: text.split(","), default=list(WAYS), help="the ways to run, separated by commas"
    )
    return parser.parse_args()


def main() -> None:
    """Train, print, draw and write JSON."""
    options = _options()
    seeds = options.rounds or (1 if options.quick else 5)
    with report.scratch(options.dir) as folder:
        curves = measure(folder.resolve(), seeds, options)
    found = figures(curves, options)
    found["conclusion"] = conclusion(found, seeds)
    found["settings"] = {"seeds": seeds, "ranks": RANKS, "seconds": options.seconds, "kill_at": options.kill_at}
    found["settings"] |= {"pause": options.pause, "max_staleness": options.max_staleness, "startup": options.startup}
    found["settings"] |= {"training": _TRAINING}
    _show(found, options)
    print("\n".join(found["conclusion"]))
    if options.plot:
        continuation_plot.draw(curves, options.kill_at, options.seconds, options.plot)
    report.write(options.json, found, [])


if __name__ == "__main__":
    main()
