"""The paper's bound on quadratics of four dimensions: what a perturbation costs, and the most it may."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import Tensor

from benchmarks import report
from lightning_scar.core.rework import iterations_bound, rework_bound
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings

KINDS = ("random", "adversarial", "reset")
_DIMENSIONS = 4
#: What counts as converged, as a share of the first distance to the optimum.
_TOLERANCE = 1e-4
#: Of rounding, in iterations.
_SLACK = 1e-3


@dataclass(frozen=True)
class Perturbed:
    """One run.

    Attributes:
        kind: How it was perturbed.
        rate: The contraction rate of its iteration.
        distance: L2 norm of the perturbation.
        remaining: L2 distance to the optimum where it struck.
        rework_cost: Iterations to converge, less those of the undisturbed run.
        iterations: Iterations to converge.
        bound: The most that these may be, from the distance at the start and the perturbation (the absolute form).
        relative_bound: The paper's bound on the rework cost alone.

    """

    kind: str
    rate: float
    distance: float
    remaining: float
    rework_cost: float
    iterations: float
    bound: float
    relative_bound: float


class Quadratic:
    """Gradient descent on :math:`x^T A x / 2`, whose optimum is 0.

    Args:
        chance: Chooses the curvatures, the axes and the start.

    Attributes:
        rate: By how much a step reduces the distance to the optimum, at least.
        start: Where it begins, at distance 1.

    """

    def __init__(self, chance: torch.Generator) -> None:
        condition = 2 + 30 * float(torch.rand((), generator=chance, dtype=torch.float64))
        curvatures = torch.logspace(0, math.log10(condition), _DIMENSIONS, dtype=torch.float64)
        axes, _ = torch.linalg.qr(torch.stack([_normal(chance) for _ in range(_DIMENSIONS)]))
        rate = 2 / (1 + condition)
        self._map = torch.eye(_DIMENSIONS, dtype=torch.float64) - rate * (axes * curvatures) @ axes.T
        self.rate = (condition - 1) / (condition + 1)
        self.start = _normal(chance)
        self.start /= self.start.norm()

    def path(self, start: Tensor) -> Iterator[Tensor]:
        """The points from a start on, without end."""
        while True:
            yield start
            start = self._map @ start


def run(kind: str, chance: torch.Generator) -> Perturbed:
    """Perturbs one descent on a random quadratic at a random iteration."""
    descent = Quadratic(chance)
    undisturbed = _iterations(descent, descent.start)
    struck = int(torch.randint(1, max(2, math.floor(undisturbed)), (), generator=chance))
    path = descent.path(descent.start)
    point = [next(path) for _ in range(struck + 1)][-1]
    disturbed = _perturbed(kind, descent.start, point, chance)
    distance = float((disturbed - point).norm())
    iterations = struck + _iterations(descent, disturbed)
    bound = iterations_bound(1.0, _TOLERANCE, {struck: distance}, descent.rate)
    # As the paper has it: of the undisturbed run it takes the worst case, not where it really was.
    relative = rework_bound(distance, descent.rate**struck, descent.rate)
    cost = iterations - undisturbed
    return Perturbed(kind, descent.rate, distance, float(point.norm()), cost, iterations, bound, relative)


def measure(trials: int, seed: int) -> dict[str, Any]:
    """Runs of every kind, and how many of them exceed a bound.

    Args:
        trials: Runs of each kind.
        seed: Of everything.

    """
    chance = torch.Generator().manual_seed(seed)
    runs = {kind: [run(kind, chance) for _ in range(trials)] for kind in KINDS}
    found: dict[str, Any] = {}
    for kind, own in runs.items():
        found[f"{kind}_runs"] = len(own)
        found[f"{kind}_over_bound"] = sum(each.iterations > each.bound + _SLACK for each in own)
        found[f"{kind}_over_relative_bound"] = sum(each.rework_cost > each.relative_bound + _SLACK for each in own)
        found[f"{kind}_rework_cost"] = sum(each.rework_cost for each in own) / len(own)
        found[f"{kind}_most_of_bound"] = max(each.iterations / each.bound for each in own)
    return {**found, "samples": [asdict(each) for own in runs.values() for each in own]}


def show(found: Mapping[str, Any]) -> None:
    """Prints how the runs compare with the bounds."""
    columns = ["perturbation", "runs", "mean rework cost", "over the bound", "closest to it", "over the relative one"]
    rows = [
        [
            *(kind, str(found[f"{kind}_runs"]), f"{found[f'{kind}_rework_cost']:.2f}"),
            *(str(found[f"{kind}_over_bound"]), f"{found[f'{kind}_most_of_bound']:.3f}"),
            str(found[f"{kind}_over_relative_bound"]),
        ]
        for kind in KINDS
    ]
    report.show("descent on random quadratics in four dimensions", columns, rows, [])


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draws rework cost over the size of the perturbation, and where the bound lies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for kind, axes in zip(KINDS, figure.subplots(1, len(KINDS), sharey=True), strict=True):
        own = [sample for sample in found["samples"] if sample["kind"] == kind]
        # Every run has its own rate: in units of the iterations in which the distance falls to a tenth.
        units = [math.log(10) / -math.log(sample["rate"]) for sample in own]
        sizes = [sample["distance"] / sample["remaining"] for sample in own]
        costs = [sample["rework_cost"] / unit for sample, unit in zip(own, units, strict=True)]
        axes.scatter(sizes, costs, s=6, alpha=0.5, color="tab:blue", label="measured")
        grid = torch.logspace(math.log10(min(sizes)), math.log10(max(sizes)), 100).tolist()
        axes.plot(grid, [math.log10(1 + size) for size in grid], color="tab:red", label="bound, at the rate")
        axes.set(xscale="log", title=kind, xlabel="‖δ‖ / distance to the optimum")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("rework cost,\nin iterations for a factor of ten")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def conclusions(found: Mapping[str, Any]) -> list[str]:
    """In plain words."""
    runs = sum(found[f"{kind}_runs"] for kind in KINDS)
    over, relative = (sum(found[f"{kind}_over_{name}"] for kind in KINDS) for name in ("bound", "relative_bound"))
    return [
        f"The bound in its absolute form is violated in {over} of {runs} runs.",
        f"The relative form is exceeded in {relative} of {runs}: it takes the worst case for the undisturbed run.",
    ]


def _normal(chance: torch.Generator) -> Tensor:
    return torch.randn(_DIMENSIONS, generator=chance, dtype=torch.float64)


def _iterations(descent: Quadratic, start: Tensor) -> float:
    """Iterations until the distance is within the tolerance, interpolated between two."""
    if start.norm() <= _TOLERANCE:
        return 0.0
    for step, (before, after) in enumerate(pairwise(descent.path(start))):
        if after.norm() <= _TOLERANCE:
            high, low = float(before.norm().log()), float(after.norm().log())
            return step + (high - math.log(_TOLERANCE)) / (high - low)
    raise AssertionError("a path has no end")


def _perturbed(kind: str, start: Tensor, point: Tensor, chance: torch.Generator) -> Tensor:
    if kind == "reset":
        return _reset(start, point, chance)
    direction = _normal(chance) if kind == "random" else point
    size = float(point.norm()) * 10 ** (3 * float(torch.rand((), generator=chance)) - 1.5)
    disturbed: Tensor = point + size * direction / direction.norm()
    return disturbed


def _reset(start: Tensor, point: Tensor, chance: torch.Generator) -> Tensor:
    """Some coordinates are lost, and restored from a running checkpoint that was saved at the start."""
    folder, weights = "/paper/bounds", start.clone()
    with RunningCheckpoint(f"memory:/{folder}", Settings(block_size=weights.element_size())) as running:
        running.save_now({"state_dict": {"weights": weights}}, step=0)
        count = int(torch.randint(1, _DIMENSIONS + 1, (), generator=chance))
        weights.copy_(point)[torch.randperm(_DIMENSIONS, generator=chance)[:count]] = torch.nan
        running.heal({"state_dict": {"weights": weights}})
    fsspec.filesystem("memory").rm(folder, recursive=True)
    return weights
