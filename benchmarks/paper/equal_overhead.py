"""What a full crash costs when every way to save may take the same share of the training time.

One Trainer measures what a save of each method costs, as :mod:`benchmarks.stall` does. Intervals follow from that, and
from these what is lost when everything must be read from disk again at a random moment: of whole checkpoints by
arithmetic, of partial saves by the library's own live estimate, taken from a training that saves at that interval. How
far that is off on real failures is in ``docs/benchmarks.md``.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarks import data, report
from benchmarks.gpt import GPT2_SMALL, TINY, GPTModule, Size, new_trainer, token_loader
from benchmarks.paper import save_costs
from benchmarks.paper.save_costs import Cost
from benchmarks.report import Target
from benchmarks.stall import FRACTION
from lightning_scar import SCARCheckpoint

#: The share of the training time that saves may take.
BUDGET = 0.01
#: Partial saves whose estimates count, after as many as write every block once.
SAVES, WARM_UP = 16, round(1 / FRACTION)
#: What an overhead may be taken for, and the cost of a save that it is made of.
KINDS = {"stall": "the stall of the training thread", "loop": "all that saves add to the loop"}


@dataclass(frozen=True)
class Setup:
    """How one model is measured.

    Attributes:
        size: The model.
        steps: Optimizer steps of a stretch, at least; one with a save goes on until it is written.
        rounds: Saves of each method.
        patience: How many disturbed stretches are repeated.
        limit: Steps of a training that measures the rework cost; to longer intervals it is extrapolated in proportion.

    """

    size: Size
    steps: int
    rounds: int
    patience: int
    limit: int


#: A tiny stretch is shorter than the ticks in which the kernel counts who used the machine: no patience there.
SETUPS = {
    "tiny": Setup(TINY, steps=40, rounds=20, patience=0, limit=4000),
    "gpt_5m": Setup(Size(4, 256, 4, 8192, 256, 128), steps=10, rounds=9, patience=20, limit=1200),
    "gpt2_small": Setup(GPT2_SMALL, steps=3, rounds=3, patience=8, limit=150),
}
#: What a save of SCAR may add to the loop, over what one of torch adds: mostly costs that do not depend on its size.
FIXED = {"tiny": 1 / 3, "gpt_5m": 1 / 4}
QUICK = {"tiny": Setup(TINY, steps=4, rounds=2, patience=0, limit=75)}


@dataclass(frozen=True)
class Row:
    """What a method loses by a crash when it saves as often as the budget allows.

    Attributes:
        kind: What the budget is spent on, of :data:`KINDS`.
        method: Who saves.
        interval: Steps from save to save.
        overhead: The share of the training time that saves take, counted so.
        slowdown: The share by which they slow the training in all.
        rework: Steps that a crash at a random moment costs.
        rework_s: Seconds in which these are made.
        over_torch: Their number over that of Lightning's ModelCheckpoint.

    """

    kind: str
    method: str
    interval: int
    overhead: float
    slowdown: float
    rework: float
    rework_s: float
    over_torch: float


def interval(cost: float, until_written: float, step: float, budget: float = BUDGET) -> int:
    """The shortest interval that a budget allows: no save begins before the one before it is written.

    Args:
        cost: Seconds that a save takes of the training.
        until_written: Steps that the training makes until a save is written.
        step: Seconds of a step.
        budget: The share of the steps' time that saves may take.

    """
    return max(1, ceil(cost / (budget * step)), ceil(until_written))


def rework(interval: int, until_written: float, after_save: float = 0.0) -> float:
    """Steps that a crash at a random moment costs.

    A save under way is lost, so the one that counts is as old as it took to write it, and on average half an interval.

    Args:
        interval: Steps from save to save.
        until_written: Steps that the training makes until a save is written.
        after_save: Steps that a crash right after a save costs; none if it is a whole one.

    """
    return after_save + interval / 2 + until_written


def round_robin(interval: int, fraction: float = FRACTION) -> float:
    """What a crash right after a save costs when all blocks are saved by turns: their ages are 0, 1, 2... intervals."""
    return interval * (1 / fraction - 1) / 2


def words(size: Size) -> "DataLoader[Tensor]":
    """The Bible in pieces, in random order: words numbered by how frequent they are, the rarest as one."""
    text = bytes(data.bible().to(torch.uint8).tolist()).decode("ascii")
    found = re.findall(r"\w+|[^\w\s]", text)
    numbers = {word: min(i, size.vocabulary - 1) for i, (word, _) in enumerate(Counter(found).most_common())}
    tokens = torch.tensor([numbers[word] for word in found])
    pieces = tokens[: len(tokens) // (size.sequence + 1) * (size.sequence + 1)].view(-1, size.sequence + 1)
    return DataLoader(pieces, batch_size=1, shuffle=True)  # type: ignore[arg-type]


class _Estimates(Callback):
    """Collects the estimates of partial saves, and stops the training when there are enough."""

    def __init__(self, scar: SCARCheckpoint) -> None:
        self.samples: list[float] = []
        self._scar = scar
        self._seen = 0

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        stats = self._scar.stats
        if stats.saves > self._seen and stats.saves - stats.full_saves > WARM_UP:
            self.samples.append(stats.rework_cost)
        self._seen = stats.saves
        if len(self.samples) == SAVES:
            trainer.should_stop = True


def estimate(size: Size, interval: int, loader: "DataLoader[Tensor]", folder: Path) -> dict[str, float]:
    """What a crash right after a partial save costs, in steps, in a training that saves at that interval."""
    pl.seed_everything(0, verbose=False)
    scar = SCARCheckpoint(folder, every_n_train_steps=interval, fraction=FRACTION, resume=False)
    estimates = _Estimates(scar)
    new_trainer([estimates, scar]).fit(GPTModule(size), loader)
    stats = {"saves": len(estimates.samples), "skipped": scar.stats.skipped_saves}
    return {"interval": interval, "steps": mean(estimates.samples), **stats}


def rows(costs: dict[str, Cost], step: float, after_save: Callable[[int], float]) -> list[Row]:
    """What each method loses, for both ways to count.

    Args:
        costs: Of a save of each method.
        step: Seconds of a step.
        after_save: Steps that a crash right after a partial save costs, by the interval.

    """
    found = []
    for kind in KINDS:
        every = {method: interval(getattr(cost, kind), cost.steps, step) for method, cost in costs.items()}
        lost = {method: rework(every[method], cost.steps) for method, cost in costs.items()}
        lost["scar"] += after_save(every["scar"])
        for method, cost in costs.items():
            overhead, slower = (seconds / (every[method] * step) for seconds in (getattr(cost, kind), cost.loop))
            in_steps, over_torch = lost[method], lost[method] / lost["torch"]
            found.append(Row(kind, method, every[method], overhead, slower, in_steps, in_steps * step, over_torch))
    return found


def measure(quick: bool, folder: Path, rounds: int | None) -> dict[str, Any]:
    """All models, by name.

    Args:
        quick: Whether a tiny model and random tokens do.
        folder: Where to save.
        rounds: Saves of each method; ``None`` for as many as suit the model.

    """
    found, threads = {}, torch.get_num_threads()
    if quick:
        # Where others use the machine, threads wait for each other far longer than a tiny model computes.
        torch.set_num_threads(1)
    for name, setup in (QUICK if quick else SETUPS).items():
        loader = token_loader(setup.size) if quick else words(setup.size)
        report.progress(f"overhead: {name}")
        found[name] = _of_model(setup, loader, folder / name, rounds or setup.rounds)
    torch.set_num_threads(threads)
    return found


def _of_model(setup: Setup, loader: "DataLoader[Tensor]", folder: Path, rounds: int) -> dict[str, Any]:
    costs, facts = save_costs.measure(
        GPTModule(setup.size), loader, folder / "costs", rounds, setup.steps, setup.patience
    )
    longest = setup.limit // (1 + WARM_UP + SAVES)
    estimates: dict[int, dict[str, float]] = {}

    def after_save(interval: int) -> float:
        at = min(interval, longest)
        if at not in estimates:
            report.progress(f"overhead: a training that saves every {at} steps, for its rework cost")
            estimates[at] = estimate(setup.size, at, loader, folder / str(at))
        return estimates[at]["steps"] * interval / at

    measured = [asdict(row) for row in rows(costs, facts["step_s"], after_save)]
    by_method = {method: asdict(cost) for method, cost in costs.items()}
    return {**facts, "costs": by_method, "estimates": list(estimates.values()), "rows": measured}


def _of_kind(of_model: dict[str, Any], kind: str) -> dict[str, Row]:
    return {row["method"]: Row(**row) for row in of_model["rows"] if row["kind"] == kind}


def show(found: dict[str, Any]) -> None:
    """Prints what the saves cost, and for both ways to count what a crash does."""
    for name, of_model in found.items():
        costs = {method: Cost(**cost) for method, cost in of_model["costs"].items()}
        title = f"{name}: one save of {of_model['state_bytes'] / 1e6:.0f} MB, a step of {of_model['step_s']:.3g} s"
        table = [
            [
                method,
                *(f"{seconds:.3g}" for seconds in (cost.stall, cost.loop, cost.written)),
                f"{cost.bytes / 1e6:.1f}",
            ]
            for method, cost in costs.items()
        ]
        report.show(title, ["method", "stall s", "loop s", "written after s", "MB"], table, [])
        for kind, meaning in KINDS.items():
            table = []
            for row in _of_kind(of_model, kind).values():
                shares = (f"{share:.2%}" for share in (row.overhead, row.slowdown))
                lost = (f"{row.rework:.1f}", f"{row.rework_s:.3g}", f"{row.over_torch:.2f}")
                table.append([row.method, f"{row.interval}", *shares, *lost])
            columns = ["method", "every", "overhead", "slower by", "lost steps", "lost s", "over torch"]
            report.show(f"{name}: {BUDGET:.0%} for {meaning}", columns, table, [])


def conclusions(found: dict[str, Any]) -> list[str]:
    """What the figures say: of each model and way to count who loses least, and what that rests on."""
    return [
        f"{name}, {BUDGET:.0%} for {meaning}: {' '.join(_sentences(of_model, kind))}"
        for name, of_model in found.items()
        for kind, meaning in KINDS.items()
    ]


def _sentences(of_model: dict[str, Any], kind: str) -> list[str]:
    own = _of_kind(of_model, kind)
    scar = own["scar"]
    best = min((row for row in own.values() if row is not scar), key=lambda row: row.rework)
    pays = "SCAR loses least" if scar.rework < best.rework else f"SCAR does not pay, {best.method} loses least"
    named = dict.fromkeys(["scar", best.method, "torch"])
    lost = ", ".join(f"{method} {own[method].rework:.1f}" for method in named)
    found = [f"{pays}; a crash costs, in steps: {lost}."]
    samples = {row.method: of_model["samples"][row.method][kind] for row in (scar, best)}
    ranges = (f"{min(seconds):.3g} to {max(seconds):.3g} s ({method})" for method, seconds in samples.items())
    found.append(f"One save cost {', '.join(ranges)}.")
    after = max(
        (each for each in of_model["estimates"] if each["interval"] <= scar.interval), key=lambda each: each["interval"]
    )
    by_turns = rework(scar.interval, of_model["costs"]["scar"]["steps"], round_robin(scar.interval))
    found.append(
        f"What scar loses is the mean over {after['saves']} saves, one every {after['interval']} steps"
        + (f", taken to one every {scar.interval}" if after["interval"] < scar.interval else "")
        + f"; with blocks by turns and no refresh it would be {by_turns:.1f}."
    )
    found.append(f"A save of scar adds {_added_over_torch(of_model):.2f} times what one of torch adds.")
    if slowed := [f"{row.method} {row.slowdown:.0%}" for row in own.values() if row.slowdown > 2 * BUDGET]:
        found.append(f"The loop is slowed by more than the budget: {', '.join(slowed)}.")
    if all(row.interval == 1 for row in own.values()):
        found.append("Every method can save at every step.")
    return found


def targets(found: dict[str, Any]) -> list[Target]:
    """What was to be reached: SCAR loses fewer steps than anyone else, and a small save costs little.

    Args:
        found: What :func:`measure` found.

    """
    aims = []
    for name in (name for name in SETUPS if name in found):
        for kind in KINDS:
            own = _of_kind(found[name], kind)
            others = min(row.rework for row in own.values() if row.method != "scar")
            aims.append(Target(f"{name}, {kind}: lost steps over the best other's", own["scar"].rework / others, 1.0))
        if name in FIXED:
            aims.append(Target(f"{name}: added over torch's", _added_over_torch(found[name]), FIXED[name]))
    return aims


def _added_over_torch(of_model: dict[str, Any]) -> float:
    costs = {method: Cost(**cost) for method, cost in of_model["costs"].items()}
    return costs["scar"].loop / costs["torch"].loop
