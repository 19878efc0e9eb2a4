r"""The rework cost, the extra steps that a run needs because of a failure: bounds, and an estimate for a crash now.

The bounds are those of SCAR (section 3). They model an optimizer step as a map :math:`f` that contracts at a rate
:math:`c`, :math:`\lVert f(x) - x^* \rVert \le c \lVert x - x^* \rVert`, and a recovery from older values as a
perturbation: step :math:`l` continues from :math:`y_l + \delta_l` instead of :math:`y_l`.

A live training knows neither :math:`c` nor :math:`x^*`. It knows how far each block has moved since it was last saved,
and in how many steps; :class:`Motion` estimates the cost from that.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def rework_bound(distance: float, remaining: float, rate: float) -> float:
    r"""Return a bound of one perturbation's cost, :math:`\log(1 + \lVert\delta\rVert / r) / \log(1 / c)` (section 3).

    This compares worst cases. A run that converges faster than its rate may lose more steps than this, but it still
    converges within :func:`iterations_bound`.

    Args:
        distance: L2 norm of the perturbation, at least 0.
        remaining: L2 distance to the optimum when it happens, above 0.
        rate: The contraction rate, in (0, 1).

    Returns:
        Steps. For a rate close to 1 and steps of length ``(1 - rate) * remaining``, this is distance / step length.

    Raises:
        ValueError: If an argument is out of range.

    Example::

        >>> round(rework_bound(distance=3.0, remaining=1.0, rate=0.5), 6)
        2.0

    """
    _require_rate(rate)
    if not (distance >= 0 and remaining > 0):
        raise ValueError(f"distance={distance!r} must be at least 0 and remaining={remaining!r} above 0")
    return -math.log1p(distance / remaining) / math.log(rate)


def iterations_bound(start: float, tolerance: float, perturbations: Mapping[int, float], rate: float) -> float:
    r"""Return after how many steps a perturbed run stays close to the optimum (SCAR, section 3).

    :math:`\log((\lVert x_0 - x^* \rVert + D_T) / \varepsilon) / \log(1 / c)` with
    :math:`D_T = \sum_l c^{-l} \lVert \delta_l \rVert`.

    Args:
        start: L2 distance to the optimum at step 0, above 0.
        tolerance: The L2 distance that counts as close, above 0.
        perturbations: The L2 norms of perturbations, by step.
        rate: The contraction rate, in (0, 1).

    Returns:
        Steps, at least 0; after them the distance is at most ``tolerance``.

    Raises:
        ValueError: If an argument is out of range.

    Example::

        >>> round(iterations_bound(start=1.0, tolerance=0.25, perturbations={1: 1.5}, rate=0.5), 6)
        4.0

    """
    _require_rate(rate)
    if not (start > 0 and tolerance > 0 and all(size >= 0 for size in perturbations.values())):
        raise ValueError(
            f"start={start!r} and tolerance={tolerance!r} must be above 0, and no perturbation below: {perturbations!r}"
        )
    # In logarithms, because c^-l overflows after a few hundred steps.
    terms = [math.log(size) - step * math.log(rate) for step, size in perturbations.items() if size]
    largest = max(terms := [math.log(start), *terms])
    total = largest + math.log(math.fsum(math.exp(term - largest) for term in terms))
    return max(0.0, (math.log(tolerance) - total) / math.log(rate))


def error_floor(distance: float, rate: float) -> float:
    """Return how close a run with a perturbation at every step comes to the optimum, ``c D / (1 - c)`` (section 3).

    Args:
        distance: A bound of the L2 norms of the perturbations, at least 0.
        rate: The contraction rate, in (0, 1).

    Returns:
        An L2 distance.

    Raises:
        ValueError: If an argument is out of range.

    Example::

        >>> error_floor(distance=1.0, rate=0.5)
        1.0

    """
    _require_rate(rate)
    if not distance >= 0:
        raise ValueError(f"distance={distance!r} must be at least 0")
    return distance * rate / (1 - rate)


def _require_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise ValueError(f"rate={rate!r} must be in (0, 1): each step leaves that share of the distance to the optimum")


@dataclass(frozen=True)
class Motion:
    r"""How fast blocks move, and how much of that a crash would undo. Sums add up over disjoint sets of blocks.

    A block that moved by :math:`\delta` in :math:`a` steps has the speed :math:`v = \delta / a`, and a crash sets it
    back by its age :math:`a`. The estimated rework cost is the mean age over all blocks, weighted by :math:`v^2`;
    blocks that were just saved have age 0. To first order this is exact if steps follow the gradient: values of a block
    that are :math:`a` steps older raise the loss by :math:`a v^2`, and a step of all blocks lowers it by
    :math:`\sum v^2`, up to the learning rate. No contraction rate is needed. For an optimizer that scales gradients
    (Adam) this holds in the metric of its preconditioner, so distances are measured in that metric. Each rank
    normalizes it by its own mean; the total estimate still lies between those of the ranks.

    A block with a refresh is off only by the error :math:`e` of its code, in an arbitrary direction. To first order
    this costs nothing. To second order it costs half of the curvature times :math:`e^2`. A block that has moved one way
    for :math:`a` steps has a curvature of about :math:`1 / a`, up to the learning rate: a larger curvature would have
    turned it around. So :math:`e^2 / 2a` is counted.

    The estimate never exceeds distance over speed, the limit of :func:`rework_bound` for slow convergence, and never
    the age of the oldest block. If steps are mostly noise it means little: old values may then be as good as new ones.

    Attributes:
        squared_speed: Sum of :math:`v^2`, in squared distance per squared step.
        squared_speed_steps: Sum of :math:`a v^2` over the blocks that a crash would set back.

    Example::

        >>> import torch
        >>> moved, age = torch.tensor([8.0, 4.0, 1.0]), torch.tensor([4, 2, 9])
        >>> round(motion(moved, moved, age, rest=torch.tensor([False, True, True])).rework_cost, 2)
        1.01

    """

    squared_speed: float = 0.0
    squared_speed_steps: float = 0.0

    def __add__(self, other: "Motion") -> "Motion":
        return Motion(self.squared_speed + other.squared_speed, self.squared_speed_steps + other.squared_speed_steps)

    @property
    def rework_cost(self) -> float:
        """The steps that a crash would cost now, plus one for each further step; 0 if nothing moves."""
        if not 0 < self.squared_speed < math.inf:
            return 0.0
        return self.squared_speed_steps / self.squared_speed


def motion(distance: Tensor, lag: Tensor, age: Tensor, rest: Tensor) -> Motion:
    """Compute the motion of blocks from the scores of a save.

    Args:
        distance: The distance of every block to its base before this save, shape ``(blocks,)``, float64: L2 times the
            root of its preconditioner. Blocks without a finite distance (NaN or Inf, a failed write) are ignored.
        lag: The distance to base plus refresh, in the same form; without a refresh, equal to ``distance``.
        age: Steps since its base, shape ``(blocks,)``. Blocks of age 0 are ignored, because they show no speed.
        rest: The blocks that this save does not write exactly, shape ``(blocks,)``, bool.

    Example::

        >>> import torch
        >>> moved, age, rest = torch.tensor([2.0, 3.0]), torch.tensor([2, 1]), torch.tensor([True, False])
        >>> motion(moved, moved, age, rest)
        Motion(squared_speed=10.0, squared_speed_steps=2.0)
        >>> round(motion(moved, moved / 10, age, rest).squared_speed_steps, 6)
        0.01

    """
    known = distance.isfinite() & (age > 0)
    squares = (distance[known].double() / age[known]).square()
    lost = torch.minimum(squares * age[known], lag[known].double().square() / (2 * age[known]))
    lost = torch.where(lag[known] < distance[known], lost, squares * age[known])
    return Motion(float(squares.sum()), float(lost[rest[known]].sum()))
