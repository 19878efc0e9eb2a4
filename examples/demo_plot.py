"""The plot of the demo: the held-out loss around the kill, and the steps that had to be repeated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from demo_training import Line

#: Steps that are shown, at most.
BEFORE, AFTER = 300, 400
INK, GREY = "#222222", "#8a8a8a"
KILL = "#c62828"
COLORS = ("#00695c", "#5b6abf", "#d17a00")


class Run(Protocol):
    """What the plot needs of a training."""

    @property
    def name(self) -> str: ...

    @property
    def every(self) -> int: ...

    @property
    def saves(self) -> list[int]: ...

    @property
    def share(self) -> float: ...

    @property
    def before(self) -> list[Line]: ...

    @property
    def after(self) -> list[Line]: ...

    @property
    def rework(self) -> int | None: ...


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw a panel for each run and write the plot."""
    figure = Figure(figsize=(8, 1 + 1.9 * len(runs)), dpi=150, layout="constrained")
    panels = figure.subplots(len(runs), sharex=True, sharey=True)
    for axes, run, color in zip(panels, runs, COLORS, strict=True):
        draw(axes, run, color)
    longest = max(run.rework if run.rework is not None else AFTER for run in runs)
    left = min(BEFORE, 40 + max(run.every + (run.before[-1].step - run.saves[-1]) for run in runs))
    # At least far enough for the text.
    panels[-1].set_xlim(-left, max(0.7 * left, min(AFTER, longest + 45)))
    highest = max(line.held_out_loss for run in runs for line in run.before[-left:])
    lowest = min(line.held_out_loss for run in runs for line in run.after)
    # Room for text below the falling curve.
    panels[-1].set_ylim(lowest - 0.4 * (highest - lowest), highest + 0.05 * (highest - lowest))
    panels[-1].set_xlabel("steps computed since the kill, including repeated ones")
    figure.supylabel("held-out loss", fontsize="medium")
    figure.suptitle("What one SIGKILL costs when saves take the same share of the time", fontweight="bold", color=INK)
    figure.savefig(path)


def draw(axes: Axes, run: Run, color: str) -> None:
    kill, goal = run.before[-1].step, run.before[-1].held_out_loss
    rework = run.rework if run.rework is not None else AFTER
    axes.axvspan(0, rework, color=color, alpha=0.15, linewidth=0)
    axes.axvline(0, color=KILL, linestyle="--", linewidth=1.2)
    axes.hlines(goal, 0, rework, color=GREY, linestyle=":", linewidth=1.2)
    losses = {line.step: line.held_out_loss for line in run.before}
    axes.plot([step - kill for step in losses], [*losses.values()], color=color, linewidth=2)
    axes.plot(range(len(run.after)), [line.held_out_loss for line in run.after], color=color, linewidth=2)
    axes.plot([s - kill for s in run.saves], [losses[s] for s in run.saves], "o", color=color, markersize=5)
    title = f"{run.name}: a save every {run.every} steps (dots) takes {run.share:.1%} of the time"
    axes.set_title(title, loc="left", fontsize="medium", color=INK)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    top = axes.get_xaxis_transform()
    outcome = f"{rework} steps to regain the loss" if run.rework is not None else "the loss is not regained"
    axes.text(-3, 0.95, f"SIGKILL after step {kill}", transform=top, color=KILL, ha="right", va="top")
    # Below the falling curve.
    axes.text(3, 0.04, f"resumed at step {run.after[0].step}:\n{outcome}", transform=top, color=INK, va="bottom")
