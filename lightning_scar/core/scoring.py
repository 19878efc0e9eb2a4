"""How far blocks are from their bases, and their refresh: one pass over the live tensors, on their device."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_scar.core import codec
from lightning_scar.core.bases import Base
from lightning_scar.core.blocks import Group, rows
from lightning_scar.core.preconditioner import sampled_squares
from lightning_scar.core.rows import pieces
from lightning_scar.core.save import Codes, Part


class Scores(NamedTuple):
    """What a pass has seen of blocks, float64 on the host, one element a block.

    Attributes:
        distance: L2 distance to the base. NaN for blocks that have to be looked at with care; infinite in a frozen
            group that has changed.
        error: L2 distance of base and refresh together to the live values.
        unfit: 1 where a block has no refresh: it holds NaN, Inf, or what its codec cannot encode.
        squares: The mean squared gradient, as far as the optimizer keeps it; NaN where it does not.

    """

    distance: Tensor
    error: Tensor
    unfit: Tensor
    squares: Tensor

    @classmethod
    def of(cls, seen: Tensor) -> "Scores":
        """From what :func:`score` gives, of several groups one after the other."""
        unit, norm, error, unfit, squares = seen.double()
        return cls(norm.sqrt() * unit, error.sqrt() * unit, unfit, squares)


def score(part: Part, base: Base, step: int, full: bool) -> Tensor:
    """Compares a group with its base and encodes its refresh. Nothing waits for the device.

    Args:
        part: The group. The memory of its codes is filled.
        base: Its base.
        step: The present optimizer step.
        full: Whether it is enough to know what is not finite, or frozen: all else has moved as far as it can.

    Returns:
        float32, shape ``(5, blocks)``, on the group's device: unit, squared distance and squared error in units, unfit,
        mean squared gradient.

    """
    group, live = part.group, part.live
    seen = torch.zeros(5, len(group), device=live[0].device)
    if base.values is not None and full and not group.frozen:
        seen[:3] = torch.where(_measured(group, live[0], None, None)[3] > 0, torch.nan, torch.inf)
    elif base.values is not None:
        seen[:4] = _measured(group, live[0], rows(base.values), part.codes.get(group.slots[0].name))
    elif base.seen is not None:
        seen[1:3] = torch.where(base.seen.differs(live[0]), torch.inf, 0.0)
        seen[0] = 1
    else:
        seen[:3] = torch.inf
    if full:
        return seen
    seen[4] = sampled_squares(group, live, step)
    for slot, tensor in zip(group.slots[1:], live[1:], strict=True):
        if (codes := part.codes.get(slot.name)) is not None:
            seen[3] = torch.maximum(seen[3], _measured(group, tensor, None, codes)[3])
    return seen


def careful(group: Group, number: int, live: Tensor, base: Tensor | None) -> Tensor:
    """The distance of a block of which the fast way cannot tell.

    Returns:
        float32, no dimension, on the tensors' device: 0 if the block has not changed, such as a mask of minus infinity;
        NaN if it has just become non-finite; infinite if its base is non-finite, or too far away for a float32; else,
        for changes between non-finite values, the root of how many there are.

    """
    if base is None:
        return torch.tensor(torch.inf)
    span = slice(*group.span(number))
    now, before = live[span], base[span]
    changed = ((now != before) & ~(now.isnan() & before.isnan())).sum()
    found = torch.where(before.isfinite().all(), torch.nan, changed.float().sqrt())
    return torch.where(changed == 0, 0.0, torch.where(now.isfinite().all(), torch.inf, found))


def _measured(group: Group, live: Tensor, base: Tensor | None, codes: Codes | None) -> Tensor:
    """What :func:`~lightning_scar.core.codec.encode` has seen, of all blocks: shape ``(4, blocks)``."""
    found = torch.empty(4, len(group), device=live.device)
    bases = pieces(base, group) if base is not None else None
    memories = codes.pieces(group) if codes is not None else None
    for numbers, blocks in pieces(live, group):
        against = next(bases).blocks if bases is not None else None
        if codes is None or memories is None:
            seen = codec.encode(None, *_as_numbers(blocks, against))
        else:
            host = next(memories)
            is_here = blocks.device == host[0].device
            own = host if is_here else codes.codec.empty(len(blocks), blocks[0].numel(), blocks.device)
            wanted = base is not None
            seen = codec.encode(codes.codec, blocks, against, codes=own[0], scales=own[1], measure=wanted)
            for to, made in zip(host, own, strict=True) if not is_here else ():
                to.copy_(made, non_blocking=True)
        found[:, numbers] = torch.stack([*seen[:3], seen.bad.to(torch.float32)])
    return found


def _as_numbers(blocks: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What can be subtracted. Integers have no measure: each that changed counts as one."""
    if blocks.is_complex():
        blocks, base = torch.view_as_real(blocks), torch.view_as_real(base) if base is not None else None
    if not blocks.dtype.is_floating_point:
        return (torch.zeros(len(blocks), 1) if base is None else (blocks != base).float()), None
    if blocks.dtype.itemsize == 1:
        return blocks.float(), base.float() if base is not None else None
    return blocks, base
