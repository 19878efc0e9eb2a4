"""Measures distances of blocks to their bases and encodes refreshes, in one pass over the live tensors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_scar.core.bases import Base
from lightning_scar.core.blocks import BlockMap, Group
from lightning_scar.core.codec import encode
from lightning_scar.core.passes import CodeMemory, Pass
from lightning_scar.core.preconditioner import sampled_squares, squares_slot
from lightning_scar.core.save import Part


class Scores(NamedTuple):
    """The measurements of blocks, one element per block, float64 on the host.

    Attributes:
        distance: L2 distance to the base. NaN for blocks that need :func:`careful`; infinite in a frozen group that has
            changed.
        error: L2 distance between base plus refresh and the live values.
        unfit: 1 if the block gets no refresh, because it holds NaN, Inf, or a value that its codec cannot encode.
        squares: The mean squared gradient; NaN if the optimizer does not keep it.

    """

    distance: Tensor
    error: Tensor
    unfit: Tensor
    squares: Tensor

    @classmethod
    def of(cls, seen: Sequence[Tensor]) -> "Scores":
        """Convert the results of :func:`score`, on the host."""
        unit, norm, error, unfit, squares = (
            torch.stack([*seen]).sum(0) if seen else torch.zeros(5, 0, device="cpu")
        ).double()
        return cls(norm.sqrt() * unit, error.sqrt() * unit, unfit.clamp_(max=1), squares)


def score(
    block_map: BlockMap,
    parts: Sequence[tuple[Part, Base]],
    passes: Sequence[Pass],
    codes: Sequence[CodeMemory | None],
    step: int,
) -> list[Tensor]:
    """Compare groups with their bases and encode their refresh. Does not synchronize with the device.

    Args:
        block_map: The map.
        parts: Its groups, each with its base.
        passes: The plan for these groups.
        codes: Where to write the codes and scales of each pass.
        step: The current optimizer step.

    Returns:
        For each device float32, shape ``(5, blocks)``, 0 for blocks elsewhere: unit, squared distance and squared error
        in units, unfit (0 if not), mean squared gradient.

    """
    devices = dict.fromkeys(tensor.device for part, _ in parts for tensor in part.live)
    found = {device: torch.zeros(5, len(block_map), dtype=torch.float32, device=device) for device in devices}
    for (part, base), start in zip(parts, block_map.offsets, strict=False):
        own = found[part.live[0].device][:, start : start + len(part.group)]
        if squares_slot(part.group) is None:
            own[4] = torch.nan
        if base.seen is not None and base.values is None:
            own[0], own[1:3] = 1, torch.where(base.seen.differs(part.live[0]), torch.inf, 0.0)
        elif base.values is None:
            own[:3] = torch.inf
    for each, into in zip(passes, codes, strict=True):
        _make(each, each.live(parts), each.bases(parts), into, found[each.kind.device], step)
    return [*found.values()]


def careful(group: Group, number: int, live: Tensor, base: Tensor | None) -> Tensor:
    """Return the distance of a block that the fast way cannot measure.

    Returns:
        float32, 0-d, on the tensors' device: 0 if the block has not changed, such as a mask of minus infinity; NaN if
        it has just become non-finite; infinite if its base is non-finite, or too far away for float32; else, if both
        are non-finite, the square root of the number of changed values.

    """
    if base is None:
        return torch.tensor(torch.inf, device=live.device)
    span = slice(*group.span(number))
    now, before = live[span], base[span]
    changed = ((now != before) & ~(now.isnan() & before.isnan())).sum()
    found = torch.where(before.isfinite().all(), torch.nan, changed.float().sqrt())
    return torch.where(changed == 0, 0.0, torch.where(now.isfinite().all(), torch.inf, found))


def _make(each: Pass, values: Tensor, base: Tensor | None, into: CodeMemory | None, found: Tensor, step: int) -> None:
    kind, numbers = each.kind, each.numbers
    if kind.has_squares:
        found[4].index_copy_(0, numbers, sampled_squares(values, step))
        if kind.codec is None:
            return
    own = into
    if kind.codec is None:
        values, base = _as_numbers(values, base)
    elif values.device.type != "cpu":
        own = kind.codec.empty(len(values), kind.n, values.device)
    codes, scales = own if own is not None else (None, None)
    seen = encode(kind.codec, values, base, codes=codes, scales=scales, measure=kind.is_compared)
    # A block gets a refresh of all its slots or none.
    found[3].index_add_(0, numbers, seen.bad.to(torch.float32))
    if kind.is_compared:
        found[:3].index_copy_(1, numbers, torch.stack(seen[:3]))
    elif kind.codec is None:
        found[:3].index_copy_(1, numbers, torch.where(seen.bad, torch.nan, torch.inf).to(torch.float32).expand(3, -1))
    if own is not into and own is not None and into is not None:
        for made, host in zip(own, into, strict=True):
            host.copy_(made, non_blocking=True)


def _as_numbers(blocks: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Convert blocks to numbers that can be subtracted; of integers, each that changed counts as 1."""
    if blocks.is_complex():
        blocks, base = torch.view_as_real(blocks), torch.view_as_real(base) if base is not None else None
    if not blocks.dtype.is_floating_point:
        return (torch.zeros_like(blocks, dtype=torch.float32) if base is None else (blocks != base).float()), None
    if blocks.dtype.itemsize == 1:
        return blocks.float(), base.float() if base is not None else None
    return blocks, base
