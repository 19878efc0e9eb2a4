"""Measures distances of blocks to their bases and encodes refreshes, in one pass over the live tensors."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_scar.core.bases import Base
from lightning_scar.core.blocks import Group, rows
from lightning_scar.core.codec import Codec, encode
from lightning_scar.core.preconditioner import sampled_squares
from lightning_scar.core.rows import pieces
from lightning_scar.core.save import Codes, Part
from lightning_scar.core.threads import batches

#: Tensors up to this size in bytes share a pass; a larger one gets its own.
_SMALL = 1 << 20


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
    def of(cls, seen: Tensor) -> "Scores":
        """Convert the results of :func:`score`, concatenated over groups."""
        unit, norm, error, unfit, squares = seen.double()
        return cls(norm.sqrt() * unit, error.sqrt() * unit, unfit, squares)


def score(parts: Sequence[tuple[Part, Base]], step: int, full: bool) -> list[Tensor]:
    """Compare groups with their bases and encode their refresh. Does not synchronize with the device.

    Args:
        parts: The groups, each with its base. Their codes are written.
        step: The current optimizer step.
        full: Whether to check only for non-finite values and changes of frozen groups; other distances are infinite.

    Returns:
        For each group float32, shape ``(5, blocks)``, on its device: unit, squared distance and squared error in units,
        unfit, mean squared gradient.

    """
    found: list[Tensor] = []
    passes: list[_Pass] = []
    for part, base in parts:
        group, live, parameter = part.group, part.live, part.group.slots[0].name
        seen = torch.zeros(5, len(group), device=live[0].device)
        found.append(seen)
        if base.values is not None and full and not group.frozen:
            passes += _passes(seen[3:4], live[0], None, None, group)
        elif base.values is not None:
            passes += _passes(seen[:4], live[0], rows(base.values), part.codes.get(parameter), group)
        elif base.seen is not None:
            seen[1:3] = torch.where(base.seen.differs(live[0]), torch.inf, 0.0)
            seen[0] = 1
        else:
            seen[:3] = torch.inf
        if not full:
            seen[4] = sampled_squares(group, live, step)
            for slot, tensor in zip(group.slots[1:], live[1:], strict=True):
                if (codes := part.codes.get(slot.name)) is not None:
                    passes += _passes(seen[3:4], tensor, None, codes, group)
    _make(passes)
    for (part, base), seen in zip(parts, found, strict=True) if full else ():
        if base.values is not None and not part.group.frozen:
            seen[:3] = torch.where(seen[3] > 0, torch.nan, torch.inf)
    return found


def careful(group: Group, number: int, live: Tensor, base: Tensor | None) -> Tensor:
    """Return the distance of a block that the fast way cannot measure.

    Returns:
        float32, 0-d, on the tensors' device: 0 if the block has not changed, such as a mask of minus infinity; NaN if
        it has just become non-finite; infinite if its base is non-finite, or too far away for float32; else, if both
        are non-finite, the square root of the number of changed values.

    """
    if base is None:
        return torch.tensor(torch.inf)
    span = slice(*group.span(number))
    now, before = live[span], base[span]
    changed = ((now != before) & ~(now.isnan() & before.isnan())).sum()
    found = torch.where(before.isfinite().all(), torch.nan, changed.float().sqrt())
    return torch.where(changed == 0, 0.0, torch.where(now.isfinite().all(), torch.inf, found))


class _Pass(NamedTuple):
    """Blocks of one size to measure.

    Attributes:
        into: Where to write the measurements, one column per block: unit, both squares and unfit, or only unfit.
        blocks: The blocks.
        base: What to subtract.
        codec: How to encode them, if at all.
        host: Memory for codes and scales.

    """

    into: Tensor
    blocks: Tensor
    base: Tensor | None
    codec: Codec | None = None
    host: tuple[Tensor, Tensor] | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """A key that passes must share to be combined."""
        blocks = self.blocks
        return self.codec, blocks[0].numel(), blocks.dtype, blocks.device, self.base is None, len(self.into)


def _passes(into: Tensor, live: Tensor, base: Tensor | None, codes: Codes | None, group: Group) -> Iterator[_Pass]:
    bases = pieces(base, group) if base is not None else None
    hosts = codes.pieces(group) if codes is not None else None
    for numbers, blocks in pieces(live, group):
        against = next(bases).blocks if bases is not None else None
        if codes is None or hosts is None:
            yield _Pass(into[:, numbers], *_as_numbers(blocks, against))
        else:
            yield _Pass(into[:, numbers], blocks, against, codes.codec, next(hosts))


def _make(passes: Sequence[_Pass]) -> None:
    """Run passes, small ones of a kind combined: models have hundreds of small tensors with few block sizes."""
    by_kind: dict[tuple[object, ...], list[_Pass]] = {}
    for each in passes:
        by_kind.setdefault((*each.kind, each.blocks.nbytes > _SMALL), []).append(each)
    for alike in by_kind.values():
        for together in batches(alike, lambda each: each.blocks.nbytes, _SMALL):
            _encode(together)


def _encode(alike: Sequence[_Pass]) -> None:
    values, base, codec, host = alike[0].blocks, alike[0].base, alike[0].codec, alike[0].host
    counts, is_told = [len(each.blocks) for each in alike], len(alike[0].into) > 1
    if len(alike) > 1:
        values = torch.cat([each.blocks.flatten(1) for each in alike])
        base = (
            torch.cat([each.base.flatten(1) for each in alike if each.base is not None]) if base is not None else None
        )
    own = host
    if codec is not None and host is not None and (len(alike) > 1 or values.device != host[0].device):
        own = codec.empty(len(values), values[0].numel(), values.device)
    codes, scales = own if own is not None else (None, None)
    seen = encode(codec, values, base, codes=codes, scales=scales, measure=is_told)
    bad = torch.split(seen.bad.to(torch.float32), counts)
    told = torch.split(torch.stack(seen[:3]), counts, 1) if is_told else ()
    for i, each in enumerate(alike):
        # A block gets a refresh of all its slots or none.
        torch.maximum(each.into[-1], bad[i], out=each.into[-1])
        if is_told:
            each.into[:3] = told[i]
    if own is not host and own is not None:
        for kind, made in enumerate(own):
            for each, part in zip(alike, torch.split(made, counts), strict=True):
                if each.host is not None:
                    each.host[kind].copy_(part, non_blocking=True)


def _as_numbers(blocks: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Convert blocks to numbers that can be subtracted; of integers, each that changed counts as 1."""
    if blocks.is_complex():
        blocks, base = torch.view_as_real(blocks), torch.view_as_real(base) if base is not None else None
    if not blocks.dtype.is_floating_point:
        return (torch.zeros(len(blocks), 1) if base is None else (blocks != base).float()), None
    if blocks.dtype.itemsize == 1:
        return blocks.float(), base.float() if base is not None else None
    return blocks, base
