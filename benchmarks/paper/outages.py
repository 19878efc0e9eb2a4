"""'Training Through Failure' (2024), simulated: are stale gradients worth more than the other ways through an outage?

Against the paper: every way starts from the same seeds, many of them, and falls back to states of its own run only;
and there are the baselines that it lacks (``benchmarks.paper.outage_ways``). Its batch is kept, 32, and plain SGD. The
CNN starts from He's weights, as from torch's it would need hundreds of updates to get going.

All stale gradients are of the same weights. Under plain SGD ``mean``, ``clipped``, ``replay`` and ``sum`` therefore go
in nearly the same direction, and only differ in how far.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

import torch
from torch import nn

from benchmarks import data, report
from benchmarks.paper import networks
from benchmarks.paper.networks import classification
from benchmarks.paper.outage_ways import GROUP, SERVER, WAYS, Schedule, simulate
from benchmarks.paper.training import ModuleTraining
from benchmarks.rework import Regression

#: Pictures in the batch of one worker, the paper's.
_BATCH = 32
#: Those that the others are compared with.
_RIVALS = ("wait", "checkpoint", "shrink")
_COLORS = {
    "none": "#777777",
    "checkpoint": "#9467bd",
    "chain": "#8c564b",
    "sum": "#d62728",
    "mean": "#ff7f0e",
    "replay": "#e377c2",
    "wait": "#1f77b4",
    "shrink": "#2ca02c",
    "cover": "#000000",
    "local_sgd": "#17becf",
}


@dataclass(frozen=True)
class Case:
    """A training and its outages.

    Attributes:
        training: Makes the training of a seed.
        schedule: When outages are.
        share: Of the trials, as some trainings cost more.

    """

    training: Callable[[int], ModuleTraining]
    schedule: Schedule
    share: float = 1.0


def regression(seed: int) -> ModuleTraining:
    """Logistic regression on MNIST by SGD."""
    torch.manual_seed(seed)
    return classification(Regression(), data.mnist(), partial(torch.optim.SGD, lr=0.1), _BATCH, 500, seed)


def cnn(seed: int) -> ModuleTraining:
    """The CNN on MNIST by SGD; the mean over three workers times this rate is their sum times the paper's, 0.01."""
    model = networks.cnn(seed).model
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return classification(model, data.mnist(), partial(torch.optim.SGD, lr=0.03), _BATCH, 250, seed)


def adam(seed: int) -> ModuleTraining:
    """The CNN on MNIST by Adam."""
    model = networks.cnn(seed).model
    return classification(model, data.mnist(), partial(torch.optim.Adam, lr=1e-3), _BATCH, 250, seed)


#: After 20 or 18 units 60 or 54 gradients of three workers are pending, and the paper's sum lowers the rate; after 16
#: they are 48, and it does not.
CASES = {
    "regression": Case(regression, Schedule(120, (25,), 20)),
    "regression_twice": Case(regression, Schedule(120, (25, 65), 16)),
    "cnn": Case(cnn, Schedule(72, (15,), 16), 1 / 3),
    "adam": Case(adam, Schedule(72, (15,), 18), 1 / 3),
}
_QUICK = {"regression": Case(regression, Schedule(40, (13,), 6))}


def measure(trials: int, seed: int, quick: bool) -> dict[str, Any]:
    """Trains with all ways and all seeds, by turns.

    Args:
        trials: How many seeds; a third of them for the CNN.
        seed: The first one.
        quick: Only the regression, shortly, with two seeds.

    Returns:
        Flat: losses at the end, with their 95 % intervals, and with how many seeds a way is ahead of its rivals.
        Nested, in ``cases``: at other moments, and the samples.

    """
    found: dict[str, Any] = {"cases": {}}
    for name, case in (_QUICK if quick else CASES).items():
        seeds = range(seed, seed + max(2, round((2 if quick else trials) * case.share)))
        curves: dict[str, list[list[float]]] = {way: [] for way in WAYS}
        for each in seeds:
            for way, losses in curves.items():
                losses.append(simulate(WAYS[way], case.training, each, case.schedule))
        found["cases"][name] = _compare(curves, case.schedule)
        for way, its in found["cases"][name]["ways"].items():
            found[f"{name}_{way}_loss"], found[f"{name}_{way}_loss_interval"] = its["losses"][-1], its["intervals"][-1]
            found |= {f"{name}_{way}_ahead_of_{other}": its["ahead"][other][-1] for other in _RIVALS}
    return found


def _compare(curves: dict[str, list[list[float]]], schedule: Schedule) -> dict[str, Any]:
    whens = schedule.moments
    at = {way: [[losses[when - 1] for when in whens] for losses in runs] for way, runs in curves.items()}
    goals = [fmean(column) for column in zip(*at["none"], strict=True)][:-1]
    ways = {}
    for way, runs in curves.items():
        columns = list(zip(*at[way], strict=True))
        ways[way] = {
            "losses": [fmean(column) for column in columns],
            "intervals": [interval(column) for column in columns],
            "reached": [report.median([_reaches(losses, goal) for losses in runs]) for goal in goals],
            "ahead": {other: _wins(at[way], at[other]) for other in _RIVALS},
            "samples": at[way],
            "curve": [fmean(column) for column in zip(*runs, strict=True)],
        }
    return {"schedule": asdict(schedule), "seeds": len(curves["none"]), "moments": whens, "goals": goals, "ways": ways}


def _reaches(losses: Sequence[float], goal: float) -> float:
    return next((float(unit) for unit, loss in enumerate(losses, start=1) if loss <= goal), math.inf)


def _wins(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> list[int]:
    pairs = zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
    return [sum(a < b for a, b in zip(mine, others, strict=True)) for mine, others in pairs]


def interval(samples: Sequence[float]) -> float:
    """Half the width of the mean's 95 % interval, by Student's t (Cornish and Fisher's series for its quantile)."""
    z, freedom = NormalDist().inv_cdf(0.975), len(samples) - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return t * stdev(samples) / math.sqrt(len(samples))


def conclusions(found: dict[str, Any]) -> list[str]:
    """In plain words: who is ahead, and whether stale gradients pay."""
    questions = [
        *(("mean", other) for other in ("checkpoint", "chain", "large_batch", "local_server")),
        *(("sum", other) for other in ("checkpoint", "chain", "mean")),
        *(("replay", "mean"), ("discount", "replay"), ("clipped", "mean"), ("large_batch", "none")),
        *(("buffer", other) for other in ("wait", "shrink", "cover", "local_sgd")),
        *(("cover", other) for other in ("none", "shrink", "wait")),
    ]
    sentences = []
    for name, case in found["cases"].items():
        for title, ways in (("server", SERVER), ("group", GROUP)):
            order = sorted(ways, key=lambda way: case["ways"][way.name]["losses"][-1])
            losses = ", ".join(f"{way.name} {case['ways'][way.name]['losses'][-1]:.3f}" for way in order)
            end = f"without a failure {case['ways']['none']['losses'][-1]:.3f}"
            sentences.append(f"{name}, {title} lost, at the end: {losses}; {end}")
        sentences += [f"{name}: {_verdict(case, *question)}" for question in questions]
    return sentences


def _verdict(case: dict[str, Any], way: str, other: str) -> str:
    """Whether a way has the lower loss, as far as the 95 % interval of the seeds' differences tells."""
    clauses = []
    for moment, when in ((0, "after the outage"), (-1, "at the end")):
        pairs = zip(case["ways"][way]["samples"], case["ways"][other]["samples"], strict=True)
        differences = [ours[moment] - theirs[moment] for ours, theirs in pairs]
        mean, half = fmean(differences), interval(differences)
        word = "level" if abs(mean) <= half else "ahead" if mean < 0 else "behind"
        wins = sum(difference < 0 for difference in differences)
        clauses.append(f"{word} {when} ({mean:+.3f} ± {half:.3f}, lower with {wins} of {case['seeds']} seeds)")
    return f"{way} against {other}: {', '.join(clauses)}"


def show(found: dict[str, Any]) -> None:
    """Prints losses at equal times and times to equal losses."""
    for name, case in found["cases"].items():
        plan = case["schedule"]
        title = f"{name}: loss, {plan['workers']} workers, down at {plan['down_at']} for {plan['down_for']} units"
        columns = [f"at {when}" for when in case["moments"]]
        rivals = [f"below {other}" for other in _RIVALS]
        rows = []
        for way, its in case["ways"].items():
            cells = [f"{loss:.3f} ± {half:.3f}" for loss, half in zip(its["losses"], its["intervals"], strict=True)]
            rows.append([way, *cells, *(f"{its['ahead'][other][-1]}/{case['seeds']}" for other in _RIVALS)])
        report.show(title, ["way", *columns, *rivals], rows, [])
        columns = [f"to {goal:.3f}" for goal in case["goals"]]
        rows = [[way, *_times(its["reached"])] for way, its in case["ways"].items()]
        report.show(f"{name}: units until a loss is reached, median", ["way", *columns], rows, [])


def _times(reached: Iterable[float]) -> list[str]:
    return [f"{units:.0f}" if math.isfinite(units) else "never" for units in reached]


def draw(found: dict[str, Any], path: Path) -> None:
    """Draws the mean loss over simulated time; outages are shaded.

    Args:
        found: What :func:`measure` returned.
        path: Where to write the picture.

    """
    from matplotlib.figure import Figure

    cases = found["cases"]
    columns = min(2, len(cases))
    rows = -(-len(cases) // columns)
    figure = Figure(figsize=(6.5 * columns, 4.2 * rows), layout="constrained")
    for place, (name, case) in enumerate(cases.items(), start=1):
        axes, plan = figure.add_subplot(rows, columns, place), case["schedule"]
        for down_at in plan["down_at"]:
            axes.axvspan(down_at, down_at + plan["down_for"], color="black", alpha=0.08, linewidth=0)
        first = plan["down_at"][0]
        for way, color in _COLORS.items():
            style = "--" if way == "none" else "-"
            losses = case["ways"][way]["curve"][first - 1 :]
            axes.plot(range(first, first + len(losses)), losses, style, color=color, label=way, linewidth=1.4)
        axes.set(title=name.replace("_", " "), xlabel="time, updates", ylabel="loss", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:.1f}")
    axes.legend(frameon=False, ncols=3, fontsize=8)
    figure.savefig(path, dpi=130)
