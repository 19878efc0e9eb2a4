"""The picture of the demo: the held-out loss around the kill, and the steps that had to be done again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from demo_training import Line

SHOWN_BEFORE = 150
SHOWN_AFTER = 80
INK, GREY = "#222222", "#8a8a8a"
KILL = "#c62828"
COLORS = ("#00695c", "#d17a00")


class Run(Protocol):
    """What the picture shows of a training."""

    @property
    def name(self) -> str: ...

    @property
    def every(self) -> int: ...

    @property
    def before(self) -> list[Line]: ...

    @property
    def after(self) -> list[Line]: ...

    @property
    def rework(self) -> int | None: ...


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draws a panel for each run and writes the picture."""
    figure = Figure(figsize=(8, 5.6), dpi=150, layout="constrained")
    panels = figure.subplots(len(runs), sharex=True, sharey=True)
    for axes, run, color in zip(panels, runs, COLORS, strict=True):
        draw(axes, run, color)
    panels[-1].set_xlabel("steps computed, those done again included")
    figure.supylabel("held-out loss", fontsize="medium")
    figure.suptitle("What one SIGKILL costs, at equal bytes written", fontweight="bold", color=INK)
    panels[0].set_xlim(right=runs[0].before[-1].step + SHOWN_AFTER + 5)
    figure.savefig(path)


def draw(axes: Axes, run: Run, color: str) -> None:
    kill, goal = run.before[-1].step, run.before[-1].held_out_loss
    before, after = run.before[-SHOWN_BEFORE:], run.after[: SHOWN_AFTER + 1]
    rework = run.rework if run.rework is not None else SHOWN_AFTER
    axes.axvspan(kill, kill + rework, color=color, alpha=0.15, linewidth=0)
    axes.axvline(kill, color=KILL, linestyle="--", linewidth=1.2)
    axes.hlines(goal, kill, kill + rework, color=GREY, linestyle=":", linewidth=1.2)
    axes.plot([line.step for line in before], [line.held_out_loss for line in before], color=color, linewidth=2)
    axes.plot([kill + n for n in range(len(after))], [line.held_out_loss for line in after], color=color, linewidth=2)
    saves = [line for line in before if line.step % run.every == 0]
    axes.plot([s.step for s in saves], [s.held_out_loss for s in saves], "o", color=color, markersize=5)
    axes.set_title(f"{run.name}, a save every {run.every} steps (dots)", loc="left", fontsize="medium", color=INK)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    describe(axes, run, kill, rework)


def describe(axes: Axes, run: Run, kill: int, rework: int) -> None:
    top = axes.get_xaxis_transform()
    outcome = f"{rework} steps to regain the loss" if run.rework is not None else "the loss is not regained"
    axes.text(kill - 2, 0.95, f"SIGKILL after step {kill}", transform=top, color=KILL, ha="right", va="top")
    axes.text(kill + 2, 0.95, f"resumed at step {run.after[0].step}:\n{outcome}", transform=top, color=INK, va="top")
