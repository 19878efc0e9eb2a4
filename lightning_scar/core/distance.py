"""How far blocks have moved: the L2 norm of the difference between live values and last saved values."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numkong
import torch
from torch import Tensor

from lightning_scar.core.threads import Run, batches, in_turn

#: Elements of a scratch tensor where one is needed.
_CHUNK = 1 << 16
#: Bytes of live values that one thread compares before it takes the next ones.
_PIECE = 1 << 22
#: Rows shorter than this are joined to whole blocks: one call of the kernel for every few elements would be slow.
_SHORTEST_ROW = 256


@dataclass(frozen=True)
class Compared:
    """Two tensors to compare block by block.

    Attributes:
        live: Present values, any shape with at least one dimension, any dtype.
        saved: Last saved values, same shape and dtype.
        rows_per_block: Rows of the first dimension in every block but the last.

    """

    live: Tensor
    saved: Tensor
    rows_per_block: int

    def __len__(self) -> int:
        """The number of blocks."""
        return -(-len(self.live) // self.rows_per_block)

    def block(self, i: int) -> tuple[Tensor, Tensor]:
        """Both tensors' rows of one block."""
        rows = slice(i * self.rows_per_block, (i + 1) * self.rows_per_block)
        return self.live[rows], self.saved[rows]

    @property
    def is_fusible(self) -> bool:
        """Whether there is a kernel that reads both tensors once. Of half precision they would round the difference."""
        live, saved = self.live, self.saved
        straight = live.is_contiguous() and saved.is_contiguous() and live.device == saved.device
        return straight and live.dtype in (torch.float32, torch.float64)

    def matrices(self) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Both tensors with a block a row, and which blocks these are: all of equal size, then a shorter last one."""
        whole, blocks = len(self.live) // self.rows_per_block, len(self)
        for first, last in ((0, whole), (whole, blocks)):
            if first < last:
                rows, shape = slice(first * self.rows_per_block, last * self.rows_per_block), (last - first, -1)
                yield self.live[rows].view(shape), self.saved[rows].view(shape), slice(first, last)


def block_distances(tensors: Sequence[Compared], run: Run = in_turn) -> Tensor:
    r"""Exact L2 distances of all blocks, :math:`\lVert x_B - \hat x_B \rVert_2`, on one pass over both tensors.

    The distance of the paper (SCAR, section 4.2: blocks that moved furthest from the running checkpoint).

    Args:
        tensors: What to compare.
        run: Shares the work out.

    Returns:
        float64, one element a block, tensor after tensor. NaN where the live values hold NaN or Inf and the saved ones
        do not; where both hold non-finite values the distance counts the finite differences only.

    Example::

        >>> block_distances([Compared(torch.tensor([3.0, 4.0, 0.0]), torch.zeros(3), rows_per_block=2)])
        tensor([5., 0.], dtype=torch.float64)

    """
    squares = [torch.empty(len(tensor), dtype=torch.float64) for tensor in tensors]
    pieces: list[_Piece] = []
    for tensor, into in zip(tensors, squares, strict=True):
        if not tensor.is_fusible:
            into.copy_(torch.stack([_square(*tensor.block(i)) for i in range(len(tensor))]))
        elif tensor.live.device.type == "cpu":
            pieces += _pieces(tensor, into)
        else:
            into.copy_(_squares_on_device(tensor))
    run(_compare, batches(pieces, lambda piece: piece.live.nbytes, _PIECE))
    distances = torch.cat([torch.empty(0, dtype=torch.float64), *squares]).sqrt_()
    for at in torch.nonzero(~distances.isfinite()).flatten().tolist():
        number, i = at, 0
        while number >= len(tensors[i]):
            number, i = number - len(tensors[i]), i + 1
        distances[at] = _careful(*tensors[i].block(number))
    return distances


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


class _Piece(NamedTuple):
    """Some blocks as the rows of two matrices, and the place of their squared distances."""

    live: Tensor
    saved: Tensor
    into: Tensor


def _pieces(tensor: Compared, into: Tensor) -> Iterator[_Piece]:
    for live, saved, blocks in tensor.matrices():
        step = max(1, _PIECE // live[0].nbytes)
        parts = (torch.split(each, step) for each in (live, saved, into[blocks]))
        yield from map(_Piece._make, zip(*parts, strict=True))


def _compare(pieces: list[_Piece]) -> None:
    for live, saved, into in pieces:
        # Sums in float64, and lets other threads run meanwhile.
        numkong.sqeuclidean(live.numpy(), saved.numpy(), out=into.numpy())


def _squares_on_device(tensor: Compared) -> Tensor:
    # `cdist` of matching rows reads both tensors once and needs no difference in memory. It sums in the tensors' own
    # precision, so rows are summed there and blocks in float64.
    parts = []
    for live, saved, _ in tensor.matrices():
        width = tensor.live[0].numel()
        width = width if width >= _SHORTEST_ROW else live.shape[1]
        rows = torch.cdist(
            live.view(-1, 1, width), saved.view(-1, 1, width), compute_mode="donot_use_mm_for_euclid_dist"
        )
        parts.append(rows.view(len(live), -1).double().square_().sum(1))
    return torch.cat(parts)


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
