"""All strategies on one task: many failures, and what they cost in the mean."""

import multiprocessing
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.paper import trials
from benchmarks.paper.strategies import FULL, LOST, POLICIES, REFRESH, STRATEGIES, Strategy
from benchmarks.paper.trials import Task, Trial
from benchmarks.report import Target

#: The most of the rework cost that :data:`~benchmarks.paper.strategies.REFRESH` is to leave, of half of the blocks
#: lost and of all.
_LEFT = {
    **{name: {0.5: 0.05, 1.0: 0.15} for name in ("mlr_mnist", "mlr_digits", "mf", "cnn_shards", "gpt")},
    "recommender": {0.5: 0.2},
}
#: The tasks of the paper, and what both of its strategies leave at most of half of the blocks.
_PAPERS, _PAPERS_LEFT = ("mlr_mnist", "mf", "lda", "cnn_layers", "cnn_shards"), 0.22
_RESAMPLES = 2000
_SMALLEST = min(strategy.fraction for strategy in STRATEGIES)


def measure(task: Task, count: int, seed: int, strategies: Sequence[Strategy] = STRATEGIES) -> dict[str, Any]:
    """Runs trials on all processors.

    Args:
        task: What is trained.
        count: How many trials.
        seed: Of the first; every trial has the next.
        strategies: What is compared.

    Returns:
        For every strategy and share of lost blocks the mean rework cost and its reduction with 95 % intervals, the
        mean squared distance, and the bytes and saves of an iteration; and the samples. ``bytes`` are those of files,
        ``nominal`` those of exact blocks, codes and scales.

    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, _prepare) as pool:
        found = pool.map(partial(trials.run, task, strategies=strategies), range(seed, seed + count))
        return figures(list(report.counted(found, count, f"{task.name}: failures")))


def _prepare() -> None:
    torch.set_num_threads(1)
    # Torch warns where this is left open, and that its sparse matrices are new.
    torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", message="Sparse CSR")


def figures(found: Sequence[Trial]) -> dict[str, Any]:
    """Means and intervals; keys are ``strategy/share lost/what``, and ``strategy/what``."""
    costs = {
        (outcome.strategy, outcome.lost): np.array([trial.outcomes[i].rework_cost for trial in found])
        for i, outcome in enumerate(found[0].outcomes)
    }
    base = costs[FULL.name, 1.0]
    summary: dict[str, Any] = {
        "trials": len(found),
        "strategies": list(found[0].saves),
        "converged": float(np.mean([trial.converged for trial in found])),
        "failed": float(np.mean([trial.failed for trial in found])),
        "never_back": sum(not outcome.is_back for trial in found for outcome in trial.outcomes),
    }
    for i, ((strategy, lost), own) in enumerate(costs.items()):
        name = f"{strategy}/{lost:g}"
        summary[f"{name}/rework_cost"] = float(own.mean())
        summary[f"{name}/rework_cost_interval"] = _interval(_resampled(own))
        # Of the same trials for both, since they share their failures.
        with np.errstate(divide="ignore", invalid="ignore"):
            summary[f"{name}/reduction"] = float(1 - own.mean() / base.mean())
            summary[f"{name}/reduction_interval"] = _interval(1 - _resampled(own) / _resampled(base))
        distances = [trial.outcomes[i].squared_distance for trial in found]
        summary[f"{name}/squared_distance"] = float(np.mean(distances))
    iterations = sum(trial.failed for trial in found)
    for strategy in found[0].saves:
        summary[f"{strategy}/nominal"] = float(np.mean([trial.nominal[strategy] for trial in found]))
        summary[f"{strategy}/bytes"] = sum(trial.nbytes[strategy] for trial in found) / iterations
        summary[f"{strategy}/saves"] = sum(trial.saves[strategy] for trial in found) / iterations
    return {**summary, "samples": [asdict(trial) for trial in found]}


def _resampled(values: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Means of samples of the trials, the same trials whatever the values."""
    chosen = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    means: np.ndarray[Any, Any] = values[chosen].mean(1)
    return means


def _interval(values: "np.ndarray[Any, Any]") -> list[float]:
    # Of few trials a sample may hold no failure that costs anything, and no share of it.
    low, high = np.nanquantile(values, (0.025, 0.975))
    return [float(low), float(high)]


def show(name: str, found: Mapping[str, Any]) -> None:
    """Prints a table."""
    columns = ["saved", "full recovery", *(f"{lost:.0%} lost" for lost in LOST[:-1]), "reduction (50%)"]
    columns += ["‖δ‖²", "saves", "kB", "of files"]
    rows = []
    for strategy in found["strategies"]:
        cells = [_with_margin(found, f"{strategy}/{lost:g}/rework_cost") for lost in (1.0, *LOST[:-1])]
        cells.append(_with_interval(found, f"{strategy}/0.5/reduction"))
        cells.append(f"{found[f'{strategy}/1/squared_distance']:.3g}")
        cells += [f"{found[f'{strategy}/saves']:.2f}"]
        cells += [f"{found[f'{strategy}/{kind}'] / 1e3:.1f}" for kind in ("nominal", "bytes")]
        rows.append([strategy, *cells])
    title = f"{name}: rework cost in iterations, {found['trials']} failures"
    report.show(f"{title}; saves and bytes an iteration", columns, rows, [])


def _with_margin(found: Mapping[str, Any], key: str) -> str:
    low, high = found[f"{key}_interval"]
    return f"{found[key]:.2f} ±{(high - low) / 2:.2f}"


def _with_interval(found: Mapping[str, Any], key: str) -> str:
    low, high = found[f"{key}_interval"]
    return f"{found[key]:.0%} ({low:.0%} to {high:.0%})"


def conclusions(name: str, found: Mapping[str, Any]) -> list[str]:
    """In plain words: what the strategies save together, whether priority beats round robin, what the refresh adds."""
    return [f"{name}: {sentence}" for sentence in (*_of_paper(found), *_of_refresh(found), *_of_blocks(found))]


def _of_paper(found: Mapping[str, Any]) -> Iterator[str]:
    if "distance 1/8" in found["strategies"]:
        both = _with_interval(found, "distance 1/8/0.5/reduction")
        partial_alone, priority_alone = found["full/0.5/reduction"], found["distance 1/8/1/reduction"]
        yield (
            f"half lost, an eighth eight times as often: both strategies save {both} of the rework cost, "
            f"partial recovery alone {partial_alone:.0%}, priority alone {priority_alone:.0%}."
        )
    if {f"{policy} 1/8" for policy in POLICIES} <= set(found["strategies"]):
        cost, round_robin, chance = (found[f"{policy} 1/8/0.5/rework_cost"] for policy in POLICIES)
        verdict = _verdict(difference(found, "distance 1/8", "round_robin 1/8"))
        yield f"priority ({cost:.2f}) {verdict} round robin ({round_robin:.2f}); random {chance:.2f}."


def _of_refresh(found: Mapping[str, Any]) -> Iterator[str]:
    if REFRESH.name not in found["strategies"]:
        return
    half, full = (_with_interval(found, f"{REFRESH.name}/{lost}/reduction") for lost in ("0.5", "1"))
    more = found[f"{REFRESH.name}/nominal"] / found[f"{FULL.name}/nominal"]
    yield (
        f"with a low-precision refresh of all other blocks, at {more:.2f} times the bytes of full checkpoints, half "
        f"lost saves {half} of the rework cost, and all lost {full}."
    )
    if "distance 1/8" in found["strategies"]:
        cost, without = (found[f"{strategy} 1/8/0.5/rework_cost"] for strategy in ("refresh", "distance"))
        verdict = _verdict(difference(found, REFRESH.name, "distance 1/8"))
        yield f"the refresh ({cost:.2f}) {verdict} exact blocks alone ({without:.2f})."


def _of_blocks(found: Mapping[str, Any]) -> Iterator[str]:
    largest = found["samples"][0]["largest_block"]
    if largest > _SMALLEST:
        yield (
            f"the largest block is {largest:.0%} of the state, and no save holds less; at equal bytes partial "
            f"saves come every {Strategy(_SMALLEST).every(largest)} iterations."
        )


def _verdict(interval: Sequence[float]) -> str:
    low, high = interval
    return "beats" if high < 0 else "loses to" if low > 0 else "is not told from"


def targets(name: str, found: Mapping[str, Any]) -> list[Target]:
    """What was to be reached on a task, in shares of the rework cost of full checkpoints with full recovery."""
    aims = []
    if name in _PAPERS and "distance 1/8" in found["strategies"]:
        left = 1 - found["distance 1/8/0.5/reduction"]
        aims.append(Target(f"{name}: rework cost left, half lost", left, _PAPERS_LEFT))
    if REFRESH.name in found["strategies"]:
        words = {0.5: "half lost", 1.0: "all lost"}
        aims += [
            Target(
                f"{name}: left with a refresh, {words[lost]}", 1 - found[f"{REFRESH.name}/{lost:g}/reduction"], limit
            )
            for lost, limit in _LEFT.get(name, {}).items()
        ]
        more = found[f"{REFRESH.name}/nominal"] / found[f"{FULL.name}/nominal"]
        aims.append(Target(f"{name}: bytes of blocks and refresh over full", more, 1.0))
    return aims


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
    return _interval(_resampled(costs[strategy] - costs[other]))


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draws the rework cost of all strategies on all tasks.

    Args:
        results: What :func:`measure` found, by task.
        path: The PNG.

    """
    from matplotlib.figure import Figure

    rows = -(-len(results) // 4)
    figure = Figure(figsize=(max(3.2 * min(len(results), 4), 11), 2.9 * rows), layout="constrained")
    panels = list(figure.subplots(rows, min(len(results), 4), squeeze=False).flat)
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    for axes, (name, found) in zip(panels, results.items(), strict=False):
        shares = sorted({each.split()[-1] for each in found["strategies"]}, key=lambda share: (share != "full", share))
        for lost, style in ((1.0, "--"), (0.5, "-")):
            recovery = f"{'full' if lost == 1 else 'partial'} recovery"
            for policy, color in zip(POLICIES, ("tab:red", "tab:blue", "tab:gray"), strict=True):
                names = [name for name in found["strategies"] if name.split()[0] in (FULL.name, policy)]
                means, intervals = _costs(found, names, lost)
                places = [shares.index(each.split()[-1]) for each in names]
                label = f"{policy.replace('_', ' ')}, {recovery}"
                axes.plot(places, means, style, color=color, label=label)
                axes.fill_between(places, intervals[:, 0], intervals[:, 1], color=color, alpha=0.15)
            if REFRESH.name in found["strategies"]:
                means, intervals = _costs(found, [REFRESH.name], lost)
                at = shares.index(REFRESH.name.split()[-1]) + (0.06 if lost == 1 else -0.06)
                # A bootstrap's interval holds its mean but for rounding.
                bars = np.abs(intervals - means[:, None]).T
                filled, label = "none" if lost == 1 else "tab:green", f"with refresh, {recovery}"
                axes.errorbar([at], means, bars, fmt="s", color="tab:green", mfc=filled, label=label)
        axes.set_xticks(range(len(shares)), shares)
        # A refresh may cost nothing, and less than that by chance.
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(name)
        axes.grid(alpha=0.3)
    figure.supylabel("rework cost, iterations")
    figure.supxlabel("share of the state in a save; half the blocks lost")
    handles = {
        label: handle
        for axes in panels[: len(results)]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend([*handles.values()], [*handles], loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)


def _costs(
    found: Mapping[str, Any], strategies: Sequence[str], lost: float
) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
    """Mean rework costs and their intervals."""
    keys = [f"{strategy}/{lost:g}/rework_cost" for strategy in strategies]
    return np.array([found[key] for key in keys]), np.array([found[f"{key}_interval"] for key in keys])
