"""Views and copies of the blocks of a tensor."""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_scar.core.blocks import Group


class Piece(NamedTuple):
    """Blocks of one size: their numbers, and a tensor with one block per item of its first dimension."""

    numbers: slice
    blocks: Tensor


def pieces(tensor: Tensor, group: Group) -> Iterator[Piece]:
    """Yield all blocks of a tensor: those of equal size, then the last one if it is shorter.

    Args:
        tensor: The rows of a group, in any layout.
        group: The group.

    Example::

        >>> group = Group("w", (5, 3), (), rows_per_block=2)
        >>> [(piece.numbers, tuple(piece.blocks.shape)) for piece in pieces(torch.zeros(5, 3), group)]
        [(slice(0, 2, None), (2, 2, 3)), (slice(2, 3, None), (1, 1, 3))]

    """
    whole = group.sizes[0][0]
    size = min(group.rows_per_block, group.rows)
    yield Piece(slice(0, whole), torch.unflatten(tensor[: whole * size], 0, (whole, size)))
    if whole < len(group):
        yield Piece(slice(whole, whole + 1), tensor[whole * size :].unsqueeze(0))


def gather(tensor: Tensor, group: Group, numbers: Sequence[int], into: Tensor, base: Tensor | None = None) -> None:
    """Copy some blocks to host memory, one after the other, with one operation per block size.

    Args:
        tensor: The rows of a group.
        group: The group.
        numbers: The numbers of the blocks, ascending.
        into: The destination: 1-d, of the tensor's dtype, on the host. From an accelerator the copy is non-blocking.
        base: If given, the blocks are copied to their places in it, too; has the shape and device of ``tensor``.

    """
    tensor, into = _bits(tensor), _bits(into)
    base = _bits(base) if base is not None else None
    bases = pieces(base, group) if base is not None else repeat(None)
    done = 0
    for piece, old in zip(pieces(tensor, group), bases, strict=False):
        wanted = [
            number - piece.numbers.start for number in numbers if piece.numbers.start <= number < piece.numbers.stop
        ]
        if not wanted:
            continue
        end = done + len(wanted) * piece.blocks[0].numel()
        _copy(piece.blocks, wanted, into[done:end].view(len(wanted), *piece.blocks.shape[1:]))
        if old is not None:
            _update(old.blocks, piece.blocks, wanted)
        done = end


def _bits(tensor: Tensor) -> Tensor:
    """View a tensor as integers, because some operations do not support all data types."""
    like = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.dtype.itemsize)
    return tensor.view(like) if like is not None else tensor


def _copy(blocks: Tensor, wanted: list[int], into: Tensor) -> None:
    if len(wanted) == len(blocks):
        into.copy_(blocks, non_blocking=True)
    elif blocks.device == into.device and blocks.is_contiguous():
        torch.index_select(blocks.flatten(1), 0, torch.tensor(wanted, device="cpu"), out=into.flatten(1))
    else:
        into.copy_(blocks[_index(wanted, blocks)], non_blocking=True)


def _update(base: Tensor, live: Tensor, wanted: list[int]) -> None:
    if len(wanted) == len(live):
        base.copy_(live)
    else:
        index = _index(wanted, live)
        base.index_copy_(0, index, live[index])


def _index(wanted: list[int], like: Tensor) -> Tensor:
    return torch.tensor(wanted, device=like.device)
