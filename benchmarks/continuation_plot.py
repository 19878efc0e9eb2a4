"""The plot of ``benchmarks.continuation``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks.curve import Curve

_NAMES = {
    "none": "no failure",
    "wait": "wait",
    "buffer_mean": "buffer, mean",
    "buffer_replay": "buffer, replay",
    "shrink": "shrink",
    "cover": "cover",
    "restart": "restart from a checkpoint",
}
_COLORS = {
    "none": "#777777",
    "wait": "#1f77b4",
    "buffer_mean": "#ff7f0e",
    "buffer_replay": "#d62728",
    "shrink": "#2ca02c",
    "cover": "#000000",
    "restart": "#9467bd",
}


def draw(curves: Mapping[str, Sequence[Curve]], kill_at: float, seconds: float, path: Path) -> None:
    """Draw the mean over seeds over time and over steps, and the band between the lowest and the highest.

    Args:
        curves: The curves of each way, one for each seed.
        kill_at: When the worker was killed.
        seconds: Where the plot ends.
        path: Where to write it.

    """
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    grid = [float(when) for when in np.linspace(0.5, seconds, 300)]
    figure, (over_time, over_steps) = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for way, runs in curves.items():
        style = {"color": _COLORS[way], "linewidth": 1.6}
        if way == "none":
            style |= {"linestyle": "--", "zorder": 5}
        _band(over_time, grid, [[one.at(when) for when in grid] for one in runs], style, _NAMES[way])
        losses = [one.by_step() for one in runs]
        steps = sorted(set.intersection(*map(set, losses)))
        _band(over_steps, steps, [[one[step] for step in steps] for one in losses], style, _NAMES[way])
    over_time.axvline(kill_at, color="black", linewidth=0.8, linestyle=":")
    place = (kill_at, over_time.get_ylim()[0])
    over_time.annotate("SIGKILL ", place, ha="right", va="bottom", rotation=90, fontsize=8)
    over_time.set(xlabel="wall-clock time since the first step, s", ylabel="loss on held-out digits")
    over_steps.set(xlabel="optimizer steps")
    over_steps.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _band(
    axes: Any, places: Sequence[float], samples: Sequence[Sequence[float]], style: Mapping[str, Any], label: str
) -> None:
    losses = np.array(samples)
    axes.plot(places, losses.mean(0), label=label, **style)
    axes.fill_between(places, losses.min(0), losses.max(0), color=style["color"], alpha=0.1, linewidth=0)
