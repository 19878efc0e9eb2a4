"""One outage in each mode, as each worker lives through it: ``python -m benchmarks.outage_picture --plot PNG``.

Three workers train, each step takes a fifth of a second or less, and rank 1 is killed by SIGKILL. A row of the picture
is a worker; what it computes, and when, is what the workers noted in one real run for each mode.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

from benchmarks import kills, report, step_log, timeline
from benchmarks.kills import Run
from benchmarks.step_log import Kill, Line
from benchmarks.timeline import Span

RANKS, VICTIM = 3, 1
MODES = ("cover", "shrink", "buffer", "wait", "restart")
_TITLES = {
    "cover": "cover: every step has all batches",
    "shrink": "shrink: steps of two workers",
    "buffer": "buffer: weights wait, gradients pile up",
    "wait": "wait",
    "restart": "torchrun: all workers start again, from a checkpoint",
}
_COLORS = {
    "own": "#2c7fb8",
    "cover": "#f28e2b",
    "buffer": "#b07aa1",
    "check": "#f9d3a8",
    "start": "#d9d9d9",
    "again": "#9fc9e3",
}
_LABELS = {
    "own": "own batch",
    "cover": "its half of the missing batch",
    "check": "check that halves change nothing",
    "buffer": "stale gradients",
    "again": "step made again",
    "start": "starting up, and a first batch alone",
}
_START_LIMIT = 180.0
#: Steps before the kill. The last checkpoint of a restart is some steps old.
_CALM, _CHECKPOINT_EVERY = 16, 10
_TRAINING = ["--pause", "0.12", "--width", "256", "--optimizer", "sgd", "--dropout", "0", "--timeline"]


class Lived(NamedTuple):
    """One outage.

    Attributes:
        spans: What workers computed when, in seconds since the kill.
        steps: When they had completed a step, by process.
        rejoined: Seconds until all ranks stepped together again.

    """

    spans: list[Span]
    steps: dict[int, list[float]]
    rejoined: float | None


def command(mode: str, folder: Path, startup: float) -> list[str]:
    """Return the command that starts a training."""
    own = ["-m", "benchmarks.elastic_training", "--folder", str(folder), "--ranks", str(RANKS), *_TRAINING]
    own += ["--startup", str(startup)]
    if mode == "restart":
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "--max-restarts", "9"]
        return [sys.executable, *run, *own, "--strategy", "ddp", "--checkpoint-every", str(_CHECKPOINT_EVERY)]
    return [sys.executable, *own, "--on-failure", mode]


def live(mode: str, folder: Path, startup: float) -> Lived:
    """Run one training through one outage."""
    environment = kills.environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    with Run(command(mode, folder, startup), folder, environment) as run:
        if not run.wait_until(lambda: run.all_at(_CALM, RANKS), _START_LIMIT):
            raise RuntimeError(f"the training ({mode}) does not start:\n{run.output[-2000:]}")
        # In the middle of a step.
        time.sleep(0.06)
        kill = run.kill(VICTIM)
        if kill is None:
            raise RuntimeError(f"there is no rank {VICTIM} to kill ({mode})")

        def rejoined() -> float | None:
            return step_log.recovery(run.lines(), kill, RANKS).rejoined_s

        if not run.wait_until(lambda: rejoined() is not None, _START_LIMIT, poll=0.05):
            raise RuntimeError(f"not all ranks step again ({mode}):\n{run.output[-2000:]}")
        time.sleep(1.5)
        lines = run.lines()
    return lived(mode, timeline.read(folder), lines, kill)


def lived(mode: str, spans: Sequence[Span], lines: Sequence[Line], kill: Kill) -> Lived:
    """Say what each span is, and count time from the kill."""
    steps: dict[int, list[float]] = {}
    for line in lines:
        steps.setdefault(line.pid, []).append(line.time)
    old = {line.pid for line in lines if line.time < kill.time}
    made = max((line.step for line in lines if line.time < kill.time), default=0)
    found = []
    for span in spans:
        own = [each for each in spans if each.pid == span.pid and each.what != "start"]
        end = next((when for when in steps.get(span.pid, []) if when > span.began), float("inf"))
        what = span.what
        if what == "alone":
            here = [each for each in own if each.what == "alone" and span.began <= each.began < end]
            # Of several before a step the last one is what it needs. A replacement's first batch is thrown away.
            what = mode if mode == "buffer" or len(here) == 1 else "check"
            what = what if span.pid in old else "start"
        elif what == "own" and any(each.what == "alone" and span.ended <= each.began < end for each in own):
            what = "check" if span.began > kill.time + 1e-3 else "own"
        step = next((line.step for line in lines if line.pid == span.pid and line.time == end), made + 1)
        if mode == "restart" and what == "own" and span.began > kill.time and step <= made:
            what = "again"
        ended = min(span.ended, kill.time if span.pid == kill.pid else float("inf"))
        found.append(span._replace(began=span.began - kill.time, ended=ended - kill.time, what=what))
    since = {pid: [when - kill.time for when in whens] for pid, whens in steps.items()}
    return Lived(found, since, step_log.recovery(lines, kill, RANKS).rejoined_s)


def draw(outages: Mapping[str, Lived], path: Path) -> None:
    """Draw a panel for each mode, and a row for each worker.

    Args:
        outages: By mode.
        path: Where to write it.

    """
    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.artist import Artist
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle

    longest = max((one.rejoined or 0 for mode, one in outages.items() if mode != "restart"), default=1.0)
    figure, panels = plt.subplots(len(outages), 1, figsize=(9, 1.55 * len(outages) + 0.9), squeeze=False)
    for axes, (mode, outage) in zip(panels[:, 0], outages.items(), strict=True):
        end = longest + 0.7 if mode != "restart" else (outage.rejoined or 0) + 1.0
        axes.set(xlim=(-0.4, end), ylim=(RANKS - 0.45, -0.55), yticks=range(RANKS))
        axes.set_yticklabels([f"rank {rank}" for rank in range(RANKS)], fontsize=8)
        for span in outage.spans:
            ended = min(span.ended, end)
            if span.began < end and ended > -0.4:
                place = (span.began, span.rank - 0.36)
                axes.add_patch(Rectangle(place, ended - span.began, 0.72, facecolor=_COLORS[span.what], linewidth=0))
        rows = {span.pid: span.rank for span in outage.spans}
        for pid, whens in outage.steps.items():
            inside = [when for when in whens if -0.4 < when < end]
            axes.vlines(inside, rows[pid] - 0.42, rows[pid] + 0.42, color="black", linewidth=0.8)
        axes.plot(0, VICTIM, marker="X", color="#d62728", markersize=9, zorder=3)
        axes.axvline(0, color="#d62728", linewidth=0.8, linestyle=":")
        if outage.rejoined is not None:
            axes.axvline(outage.rejoined, color="#555555", linewidth=0.8, linestyle="--")
        scale = " (another scale)" if mode == "restart" and len(outages) > 1 else ""
        axes.set_title(f"{_TITLES[mode]}{scale}", loc="left", fontsize=9, fontweight="bold", pad=3)
        axes.tick_params(labelsize=8, length=2)
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[-1, 0].set_xlabel("seconds since rank 1 was killed by SIGKILL", fontsize=9)
    kinds = {span.what for one in outages.values() for span in one.spans}
    handles: list[Artist] = [
        Patch(facecolor=_COLORS[what], label=label) for what, label in _LABELS.items() if what in kinds
    ]
    handles.append(Patch(facecolor="white", edgecolor="#bbbbbb", linewidth=0.6, label="waiting"))
    handles.append(Line2D([], [], color="black", linewidth=1, label="step completed"))
    handles.append(Line2D([], [], color="#555555", linewidth=1, linestyle="--", label="all step together"))
    figure.legend(handles=handles, loc="upper center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.62 / figure.get_figheight()), h_pad=0.5)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Run, print, draw and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--plot", metavar="PNG", type=Path, required=True, help="where to draw it")
    parser.add_argument("--modes", default=",".join(MODES), help="those to run, comma-separated")
    parser.add_argument("--startup", type=float, default=0.5, help="seconds more that a replacement takes to start")
    report.add_places(parser)
    options = parser.parse_args()
    outages: dict[str, Lived] = {}
    with report.scratch(options.dir) as folder:
        for mode in options.modes.split(","):
            outages[mode] = live(mode, folder.resolve() / mode, options.startup)
            report.progress(f"{mode}: all ranks step together after {outages[mode].rejoined:.2f} s")
    draw(outages, options.plot)
    figures: dict[str, Any] = {f"{mode}_rejoined_s": one.rejoined for mode, one in outages.items()}
    samples = {mode: one._asdict() for mode, one in outages.items()}
    report.write(options.json, {**figures, "samples": samples, "settings": {"startup": options.startup}}, [])


if __name__ == "__main__":
    main()
