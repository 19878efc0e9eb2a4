"""How far blocks have moved: the L2 norm of the difference between live values and last saved values."""

from collections.abc import Iterator

import torch
from torch import Tensor

#: Elements of a scratch tensor where one is needed.
_CHUNK = 1 << 16
#: Rows shorter than this are joined to whole blocks: one call of the kernel for every few elements would be slow.
_SHORTEST_ROW = 256


def block_distances(live: Tensor, saved: Tensor, rows_per_block: int) -> Tensor:
    r"""Exact L2 distances of all blocks of one tensor, :math:`\lVert x_B - \hat x_B \rVert_2`, on one pass over both.

    The distance of the paper (SCAR, section 4.2: blocks that moved furthest from the running checkpoint).

    Args:
        live: Present values, any shape with at least one dimension, any dtype.
        saved: Last saved values, same shape and dtype.
        rows_per_block: Rows of the first dimension in every block but the last.

    Returns:
        float64, one element a block. NaN where ``live`` holds NaN or Inf and ``saved`` does not; where both hold
        non-finite values the distance counts the finite differences only.

    Example::

        >>> block_distances(torch.tensor([3.0, 4.0, 0.0]), torch.zeros(3), rows_per_block=2)
        tensor([5., 0.], dtype=torch.float64)

    """
    squares = _squares_fused(live, saved, rows_per_block) if _fusible(live, saved) else None
    if squares is None:
        squares = torch.stack([_square(a, b) for a, b in _blocks(live, saved, rows_per_block)])
    distances = squares.sqrt_()
    for i in torch.nonzero(~distances.isfinite()).flatten().tolist():
        start = i * rows_per_block
        distances[i] = _careful(live[start : start + rows_per_block], saved[start : start + rows_per_block])
    return distances.cpu()


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or Inf, without a temporary of the tensor's size.

    Example::

        >>> is_finite(torch.tensor([1.0, float("inf")])), is_finite(torch.tensor([1, 2]))
        (False, True)

    """
    if not (values.is_floating_point() or values.is_complex()):
        return True
    if values.is_complex():
        values = torch.view_as_real(values)
    if values.dtype.itemsize == 1:
        return all(bool(chunk.float().isfinite().all()) for chunk in torch.split(values.reshape(-1), _CHUNK))
    return bool(torch.linalg.vector_norm(values, ord=torch.inf).isfinite())


def _fusible(live: Tensor, saved: Tensor) -> bool:
    return (
        live.dtype in (torch.float32, torch.float64)
        and live.is_contiguous()
        and saved.is_contiguous()
        and live.device == saved.device
    )


def _squares_fused(live: Tensor, saved: Tensor, rows_per_block: int) -> Tensor:
    # `cdist` of matching rows reads both tensors once and needs no difference in memory. It sums in the tensors' own
    # precision, so short stretches are summed there and the stretches in float64.
    rows = live.shape[0]
    whole = rows // rows_per_block
    parts = []
    for start, stop, blocks in ((0, whole * rows_per_block, whole), (whole * rows_per_block, rows, 1)):
        if start == stop:
            continue
        a, b = live[start:stop].reshape(blocks, -1), saved[start:stop].reshape(blocks, -1)
        width = a.shape[1] * blocks // (stop - start)
        width = width if width >= _SHORTEST_ROW else a.shape[1]
        a, b = a.view(-1, 1, width), b.view(-1, 1, width)
        stretches = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        parts.append(stretches.view(blocks, -1).double().square_().sum(1))
    return torch.cat(parts)


def _blocks(live: Tensor, saved: Tensor, rows_per_block: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(live, rows_per_block), torch.split(saved, rows_per_block), strict=True)


def _square(live: Tensor, saved: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=live.device)
    for a, b in _chunks(live, saved):
        total += torch.linalg.vector_norm(a - b.to(a.device)).square()
    return total


def _chunks(live: Tensor, saved: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, _CHUNK // max(1, live[0].numel()))
    wide = torch.complex128 if live.is_complex() else torch.float64
    for a, b in zip(torch.split(live, rows), torch.split(saved, rows), strict=True):
        # One row may be as large as the parameter.
        for x, y in zip(torch.split(a.reshape(-1), _CHUNK), torch.split(b.reshape(-1), _CHUNK), strict=True):
            yield x.to(wide), y.to(wide)


def _careful(live: Tensor, saved: Tensor) -> float:
    """The distance where the fast way gave NaN or Inf: an overflow, new damage, or values that were never finite."""
    if is_finite(saved) and not is_finite(live):
        return torch.nan
    total = 0.0
    for a, b in _chunks(live, saved):
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, torch.zeros_like(a), a - b)
        # A change to, from or between non-finite values has no size; it counts as a change of one.
        difference = torch.where(difference.isfinite(), difference, torch.ones_like(difference))
        total += float(torch.linalg.vector_norm(difference)) ** 2
    return float(total**0.5)
