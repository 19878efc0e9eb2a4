"""Weighted sums of gradients, in memory that is reused."""

import torch
from torch import Tensor

#: The length of a tally's head: weight, samples and contributions. The weight of each parameter's gradients follows.
TOTALS = 3


class GradientSum:
    """The weighted sum of contributions. Its memory is allocated with the first one, and kept.

    Args:
        n_parameters: The number of gradients in a contribution.

    Attributes:
        sums: One for each parameter, in its shape and at least float32; ``None`` where there was no gradient yet.
        tally: Weight, samples and contributions, then the weight of each parameter's gradients; float64.

    """

    def __init__(self, n_parameters: int) -> None:
        self.sums: list[Tensor | None] = [None] * n_parameters
        self.tally = torch.zeros(TOTALS + n_parameters, dtype=torch.float64, device="cpu")

    def add(self, grads: list[Tensor | None], weight: float, samples: int) -> None:
        """Add one contribution.

        Args:
            grads: One for each parameter, or ``None``.
            weight: The factor of the gradients.
            samples: The number of samples in it.

        """
        seen = [weight if grad is not None else 0.0 for grad in grads]
        self.tally += torch.tensor([weight, samples, 1, *seen], dtype=torch.float64, device="cpu")
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            if (total := self.sums[i]) is None:
                total = self.sums[i] = wide_zeros(grad)
            total.add_(grad, alpha=weight)

    def clear(self) -> None:
        """Start again in the same memory."""
        self.tally.zero_()
        for total in self.sums:
            if total is not None:
                total.zero_()


def as_real(values: Tensor) -> Tensor:
    """View complex numbers as pairs of real ones, because gloo does not sum complex numbers."""
    return torch.view_as_real(values) if values.is_complex() else values


def dense_grad(index: int, parameter: Tensor) -> Tensor | None:
    """Return the gradient of a parameter, complex numbers as pairs.

    Raises:
        ValueError: If it is sparse.

    """
    if (grad := parameter.grad) is None:
        return None
    if grad.layout != torch.strided:
        what = f"the gradient of parameter {index}, shape {tuple(grad.shape)}, has layout {grad.layout}"
        raise ValueError(f"{what}; only dense gradients are supported: create its module with sparse=False")
    return as_real(grad)


def wide_zeros(like: Tensor) -> Tensor:
    """Return zeros of the same shape, at least float32: sums in half precision would lose small numbers."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def set_grad(parameter: Tensor, values: Tensor) -> None:
    """Set the gradient of a parameter."""
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    # In place, because with DDP it may be a view of a bucket; and a copy, because the next `backward` overwrites it.
    grad = as_real(parameter.grad)
    grad.copy_(values.view(grad.shape))


def are_finite(grads: list[Tensor]) -> bool:
    """Return whether no gradient contains NaN or Inf."""
    # The extremes are NaN if any element is. One answer for all gradients, because each answer synchronizes a GPU.
    extremes = [extreme for grad in grads if grad.numel() for extreme in torch.aminmax(grad)]
    together = [extreme.to(extremes[0].device) for extreme in extremes]
    return not together or bool(torch.stack(together).isfinite().all())
