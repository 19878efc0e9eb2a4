"""Weighted sums of gradients, in memory that is used again."""

import torch
from torch import Tensor

#: What a tally begins with: weight, samples and contributions. The weight of each parameter's gradients follows.
TOTALS = 3


class GradientSum:
    """The weighted sum of consecutive contributions. Memory comes with the first and stays.

    Args:
        n_parameters: How many gradients a contribution has.

    Attributes:
        sums: One for each parameter, in its shape and at least float32; ``None`` where there was no gradient yet.
        tally: Weight, samples and contributions, and the weight of each parameter's gradients; float64.
        staleness: The greatest, in steps.

    """

    def __init__(self, n_parameters: int) -> None:
        self.sums: list[Tensor | None] = [None] * n_parameters
        self.tally = torch.zeros(TOTALS + n_parameters, dtype=torch.float64)
        self.staleness = 0

    def add(self, grads: list[Tensor | None], weight: float, samples: int, staleness: int) -> None:
        """Adds one contribution.

        Args:
            grads: One for each parameter, or ``None``.
            weight: What it weighs; with 0 it only counts.
            samples: How many samples it saw.
            staleness: Its staleness, in steps.

        """
        seen = [weight if grad is not None else 0.0 for grad in grads]
        self.tally += torch.tensor([weight, samples, 1, *seen], dtype=torch.float64)
        self.staleness = max(self.staleness, staleness)
        for i, grad in enumerate(grads):
            if grad is None or not weight:
                continue
            if (total := self.sums[i]) is None:
                total = self.sums[i] = wide_zeros(grad)
            total.add_(grad, alpha=weight)

    def take(self, other: "GradientSum") -> None:
        """Adds another's contributions to its own and clears the other."""
        self.tally += other.tally
        self.staleness = max(self.staleness, other.staleness)
        for i, theirs in enumerate(other.sums):
            if (mine := self.sums[i]) is None:
                self.sums[i], other.sums[i] = theirs, None
            elif theirs is not None:
                mine.add_(theirs)
        other.clear()

    def clear(self) -> None:
        """Begins anew in the same memory."""
        self.tally.zero_()
        self.staleness = 0
        for total in self.sums:
            if total is not None:
                total.zero_()


def as_real(values: Tensor) -> Tensor:
    """Complex numbers as pairs: gloo adds no others."""
    return torch.view_as_real(values) if values.is_complex() else values


def dense_grad(index: int, parameter: Tensor) -> Tensor | None:
    """The gradient of a parameter, complex numbers as pairs.

    Raises:
        ValueError: If it is sparse.

    """
    if (grad := parameter.grad) is None:
        return None
    if grad.layout != torch.strided:
        what = f"the gradient of parameter {index}, shape {tuple(grad.shape)}, has layout {grad.layout}"
        raise ValueError(f"{what}; only dense ones can be held: make its module with sparse=False")
    return as_real(grad)


def wide_zeros(like: Tensor) -> Tensor:
    """Zeros of the same shape, at least float32: sums of half-precision numbers would lose the small ones."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def set_grad(parameter: Tensor, values: Tensor) -> None:
    """Gives a parameter this gradient."""
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    # In place: DDP may have it as a view of its own memory. And no view of ours, which the next `backward` would fill.
    grad = as_real(parameter.grad)
    grad.copy_(values.view(grad.shape))


def are_finite(grads: list[Tensor]) -> bool:
    """Whether there is neither NaN nor Inf in any of them."""
    # The extremes are NaN if any element is. One answer for all: each would make a GPU wait.
    extremes = [extreme for grad in grads if grad.numel() for extreme in torch.aminmax(grad)]
    together = [extreme.to(extremes[0].device) for extreme in extremes]
    return not together or bool(torch.stack(together).isfinite().all())
