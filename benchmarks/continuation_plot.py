"""The plot of ``benchmarks.continuation``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

from benchmarks.curve import Curve

_NAMES = {
    "none": "no failure",
    "wait": "wait",
    "buffer_mean": "buffer, mean",
    "buffer_replay": "buffer, replay",
    "shrink": "shrink",
    "restart": "restart from a checkpoint",
}
_COLORS = {
    "none": "#777777",
    "wait": "#1f77b4",
    "buffer_mean": "#ff7f0e",
    "buffer_replay": "#d62728",
    "shrink": "#2ca02c",
    "restart": "#9467bd",
}


def draw(curves: Mapping[str, Sequence[Curve]], kill_at: float, seconds: float, path: Path) -> None:
    """Draw the mean over seeds, and the band between the lowest and the highest.

    Args:
        curves: The curves of each way, one for each seed.
        kill_at: When the worker was killed.
        seconds: Where the plot ends.
        path: Where to write it.

    """
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    grid = np.linspace(0.5, seconds, 300)
    figure, axes = plt.subplots(figsize=(9, 5))
    for way, runs in curves.items():
        losses = np.array([[one.at(float(when)) for when in grid] for one in runs])
        style = "--" if way == "none" else "-"
        axes.plot(grid, losses.mean(0), style, color=_COLORS[way], label=_NAMES[way], linewidth=1.6)
        axes.fill_between(grid, losses.min(0), losses.max(0), color=_COLORS[way], alpha=0.12, linewidth=0)
    axes.axvline(kill_at, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("SIGKILL ", (kill_at, axes.get_ylim()[0]), ha="right", va="bottom", rotation=90, fontsize=8)
    axes.set_xlabel("wall-clock time since the first step, s")
    axes.set_ylabel("loss on held-out digits")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
