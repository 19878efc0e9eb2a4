"""All strategies on one task: many failures, and what they cost in the mean."""

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.paper import trials
from benchmarks.paper.strategies import FULL, LOST, STRATEGIES
from benchmarks.paper.trials import Task, Trial

_POLICIES = ("distance", "round_robin", "random")
_FRACTIONS = ("1/2", "1/4", "1/8")
_RESAMPLES = 2000


def measure(task: Task, count: int, seed: int, processes: int | None = None) -> dict[str, Any]:
    """Runs trials on all processors.

    Args:
        task: What is trained.
        count: How many trials.
        seed: Of the first; every trial has the next.
        processes: How many run at once; ``None`` for one a processor.

    Returns:
        For every strategy and share of lost blocks the mean rework cost and its reduction with 95 % intervals, the
        mean squared distance, and the bytes and saves of an iteration; and the samples.

    """
    with ProcessPoolExecutor(
        processes or os.cpu_count(), multiprocessing.get_context("spawn"), _use_one_thread
    ) as pool:
        found = list(pool.map(partial(trials.run, task), range(seed, seed + count)))
    return figures(found)


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def figures(found: Sequence[Trial]) -> dict[str, Any]:
    """Means and intervals; keys are ``strategy/share lost/what``, and ``strategy/what``."""
    costs = {
        (outcome.strategy, outcome.lost): np.array([trial.outcomes[i].rework_cost for trial in found])
        for i, outcome in enumerate(found[0].outcomes)
    }
    base = costs[FULL.name, 1.0]
    chosen = np.random.default_rng(0).integers(len(found), size=(_RESAMPLES, len(found)))
    summary: dict[str, Any] = {
        "trials": len(found),
        "converged": float(np.mean([trial.converged for trial in found])),
        "failed": float(np.mean([trial.failed for trial in found])),
        "never_back": sum(not outcome.is_back for trial in found for outcome in trial.outcomes),
    }
    for i, ((strategy, lost), own) in enumerate(costs.items()):
        name = f"{strategy}/{lost:g}"
        summary[f"{name}/rework_cost"] = float(own.mean())
        summary[f"{name}/rework_cost_interval"] = _interval(own[chosen].mean(1))
        summary[f"{name}/reduction"] = float(1 - own.mean() / base.mean())
        # Of the same trials for both, since they share their failures.
        summary[f"{name}/reduction_interval"] = _interval(1 - own[chosen].mean(1) / base[chosen].mean(1))
        distances = [trial.outcomes[i].squared_distance for trial in found]
        summary[f"{name}/squared_distance"] = float(np.mean(distances))
    for strategy in dict.fromkeys(name for name, _ in costs):
        iterations = sum(trial.failed for trial in found)
        summary[f"{strategy}/bytes"] = sum(trial.nbytes[strategy] for trial in found) / iterations
        summary[f"{strategy}/saves"] = sum(trial.saves[strategy] for trial in found) / iterations
    return {**summary, "samples": [asdict(trial) for trial in found]}


def _interval(values: "np.ndarray[Any, Any]") -> list[float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return [float(low), float(high)]


def show(name: str, found: Mapping[str, Any]) -> None:
    """Prints a table."""
    columns = ["saved", "full recovery", *(f"{lost:.0%} lost" for lost in LOST[:-1]), "reduction (50%)"]
    columns += ["‖δ‖²", "saves", "kB"]
    rows = []
    for strategy in STRATEGIES:
        cells = [_with_margin(found, f"{strategy.name}/{lost:g}/rework_cost") for lost in (1.0, *LOST[:-1])]
        cells.append(_with_interval(found, f"{strategy.name}/0.5/reduction"))
        cells.append(f"{found[f'{strategy.name}/1/squared_distance']:.3g}")
        cells += [f"{found[f'{strategy.name}/saves']:.2f}", f"{found[f'{strategy.name}/bytes'] / 1e3:.1f}"]
        rows.append([strategy.name, *cells])
    title = f"{name}: rework cost in iterations, {found['trials']} failures"
    report.show(f"{title}; saves and bytes an iteration", columns, rows, [])


def _with_margin(found: Mapping[str, Any], key: str) -> str:
    low, high = found[f"{key}_interval"]
    return f"{found[key]:.2f} ±{(high - low) / 2:.2f}"


def _with_interval(found: Mapping[str, Any], key: str) -> str:
    low, high = found[f"{key}_interval"]
    return f"{found[key]:.0%} ({low:.0%} to {high:.0%})"


def conclusions(name: str, found: Mapping[str, Any]) -> list[str]:
    """In plain words: what both strategies save together, and whether priority beats round robin."""
    both = _with_interval(found, "distance 1/8/0.5/reduction")
    partial_alone, priority_alone = found["full/0.5/reduction"], found["distance 1/8/1/reduction"]
    cost, round_robin, chance = (found[f"{policy} 1/8/0.5/rework_cost"] for policy in _POLICIES)
    low, high = difference(found, "distance 1/8", "round_robin 1/8")
    verdict = "beats" if high < 0 else "loses to" if low > 0 else "is not told from"
    return [
        f"{name}: half lost, an eighth eight times as often: both strategies save {both} of the rework cost, "
        f"partial recovery alone {partial_alone:.0%}, priority alone {priority_alone:.0%}.",
        f"{name}: priority ({cost:.2f}) {verdict} round robin ({round_robin:.2f}); random {chance:.2f}.",
    ]


def difference(found: Mapping[str, Any], strategy: str, other: str, lost: float = 0.5) -> list[float]:
    """The 95 % interval of how much more one strategy costs than another in the same failures, in iterations."""
    costs = {
        name: np.array(
            [
                next(o["rework_cost"] for o in trial["outcomes"] if (o["strategy"], o["lost"]) == (name, lost))
                for trial in found["samples"]
            ]
        )
        for name in (strategy, other)
    }
    chosen = np.random.default_rng(0).integers(len(found["samples"]), size=(_RESAMPLES, len(found["samples"])))
    return _interval((costs[strategy] - costs[other])[chosen].mean(1))


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draws the rework cost of all strategies on all tasks.

    Args:
        results: What :func:`measure` found, by task.
        path: The PNG.

    """
    from matplotlib.figure import Figure

    rows = -(-len(results) // 4)
    figure = Figure(figsize=(3.2 * min(len(results), 4), 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, min(len(results), 4), squeeze=False).flat
    for axes, (name, found) in zip(panels, results.items(), strict=False):
        for lost, style in ((1.0, "--"), (0.5, "-")):
            for policy, color in zip(_POLICIES, ("tab:red", "tab:blue", "tab:gray"), strict=True):
                names = [FULL.name, *(f"{policy} {fraction}" for fraction in _FRACTIONS)]
                means = [found[f"{each}/{lost:g}/rework_cost"] for each in names]
                intervals = np.array([found[f"{each}/{lost:g}/rework_cost_interval"] for each in names])
                label = f"{policy.replace('_', ' ')}, {'full' if lost == 1 else 'partial'} recovery"
                axes.plot(range(4), means, style, color=color, label=label)
                axes.fill_between(range(4), intervals[:, 0], intervals[:, 1], color=color, alpha=0.15)
        axes.set_xticks(range(4), ["full", *_FRACTIONS])
        axes.set(title=name, ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.supylabel("rework cost, iterations")
    figure.supxlabel("share of the state in a save; half the blocks lost")
    figure.axes[0].legend(fontsize=6)
    figure.savefig(path, dpi=120)
