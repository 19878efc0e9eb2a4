"""Encodes tiles of values: codes, scales and errors."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

#: The bits of a float32 that bfloat16 drops.
_LOWER_HALF = (1 << 16) - 1
_INT_MAX = (1 << 31) - 1
_SMALLEST = torch.finfo(torch.float32).tiny


def log_step(bits: int) -> int:
    """Return the spacing of the codes of positive values for a range of 2^16, rounded down by at most 2^-14 of it."""
    return (1 << 16) // ((1 << bits) - 2)


class Work(NamedTuple):
    """Tiles, scratch memory of their shape, and outputs; ``seen`` is unit, norm and the error's norm, in units."""

    x: Tensor
    y: Tensor
    z: Tensor
    spare: Tensor
    codes: Tensor
    scales: Tensor
    seen: Tensor


def _largest(x: Tensor) -> Tensor:
    return torch.maximum(x.amax(1), x.amin(1).neg_())


def _norm(x: Tensor, out: Tensor | None = None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, out=out)
    return norm


def measure_tiles(work: Work, measure: bool) -> None:
    """Measure values as if all codes were zero."""
    unit, norm, error = work.seen
    unit.copy_(_largest(work.x).clamp_min_(_SMALLEST))
    if measure:
        error.copy_(_norm(work.x.div_(unit.unsqueeze(1)), norm))


def linear(bits: int, work: Work, measure: bool) -> None:
    """Encode signed values in 4 or 8 bits."""
    x, y, (scale, norm, error) = work.x, work.y, work.seen
    # Increased so that rounding to the nearest bfloat16 cannot make it too small.
    largest = _largest(x).mul_((1 + 2**-8) / ((1 << bits - 1) - 1)).clamp_min_(_SMALLEST)
    scale.copy_(work.scales.view(torch.bfloat16)[0].copy_(largest))
    x.div_(scale.unsqueeze(1))
    if measure:
        _norm(x, norm)
    torch.round(x, out=y)
    _pack(bits, y, work.z, work.codes.view(torch.int8))
    if measure:
        _norm(x.sub_(y), error)


def ternary(work: Work, measure: bool) -> None:
    """Encode signed values in 2 bits."""
    x, y, z, (scale, norm, error) = work.x, work.y, work.z, work.seen
    largest = _largest(x).clamp_min_(_SMALLEST)
    _norm(x.div_(largest.unsqueeze(1)), norm)
    squares = norm.square()
    # Both sums are at least 1, except in a tile of zeros or denormal values.
    middle = squares / torch.abs(x, out=z).sum(1).clamp_min_(_SMALLEST)
    torch.div(x, middle.clamp_min_(_SMALLEST).unsqueeze(1), out=y).round_().clamp_(-1, 1)
    relative = squares.div_(torch.mul(x, y, out=z).sum(1).clamp_min_(_SMALLEST))
    scale.copy_(work.scales.view(torch.bfloat16)[0].copy_(relative.mul_(largest).clamp_min_(_SMALLEST)))
    _pack(2, y, z, work.codes.view(torch.int8))
    if measure:
        largest.div_(scale)
        norm.mul_(largest)
        _norm(x.mul_(largest.unsqueeze(1)).sub_(y), error)
    else:
        norm.fill_(torch.nan)


def log(bits: int, work: Work, measure: bool) -> None:
    """Encode values that are never negative."""
    x, y, (unit, norm, error) = work.x, work.y, work.seen
    found, positive = work.z.view(torch.int32), work.spare.view(torch.int32)
    if not measure and may_look(x) and _log_of_positive(bits, work):
        return
    pattern = x.add_(0.0).view(torch.int32)  # Minus zero becomes zero.
    # The sum wraps around: zero becomes the largest number, and positive patterns keep their order.
    low = torch.add(pattern, _INT_MAX, out=found).amin(1).sub_(_INT_MAX).bitwise_right_shift_(16)
    # Rounded up. A negative value makes it negative, which is a NaN pattern.
    high = pattern.amax(1).clamp_max_(_INT_MAX - _LOWER_HALF).add_(_LOWER_HALF).bitwise_right_shift_(16)
    high.bitwise_or_(pattern.amin(1).bitwise_right_shift_(31))
    work.scales[0].copy_(low)
    work.scales[1].copy_(high)
    step, lowest = (high - low).mul_(log_step(bits)).unsqueeze_(1), (low << 16).unsqueeze_(1)
    y.copy_(torch.sub(pattern, lowest, out=found)).mul_(step.clamp_min(1).to(torch.float32).reciprocal())
    found.copy_(y.round_())
    torch.sign(pattern, out=positive)
    unit.copy_((high << 16).view(torch.float32).clamp_min_(_SMALLEST))
    if measure:
        torch.mul(found, step, out=y.view(torch.int32)).add_(lowest).mul_(positive)
        _norm(x.div_(unit.unsqueeze(1)), norm)
        _norm(y.div_(unit.unsqueeze(1)).sub_(x), error)
    _pack(bits, found.add_(1).mul_(positive), y, work.codes)


def may_look(tensor: Tensor) -> bool:
    """Return whether reading values needs no synchronization."""
    return tensor.device.type == "cpu"


def _log_of_positive(bits: int, work: Work) -> bool:
    """Encode values that are all above zero in half the time; return whether they are. Reads values."""
    pattern, found = work.x.view(torch.int32), work.z.view(torch.int32)
    low, high = pattern.amin(1), pattern.amax(1)
    if int(low.min()) <= 0 or int(high.max()) > _INT_MAX - 2 * _LOWER_HALF:
        return False
    low.bitwise_right_shift_(16)
    high.add_(_LOWER_HALF).bitwise_right_shift_(16)
    work.scales[0].copy_(low)
    work.scales[1].copy_(high)
    work.seen[0].copy_((high << 16).view(torch.float32).clamp_min_(_SMALLEST))
    step = (high - low).mul_(log_step(bits)).clamp_min_(1).unsqueeze_(1)
    y = work.y.copy_(torch.sub(pattern, (low << 16).unsqueeze_(1), out=found)).mul_(step.to(torch.float32).reciprocal())
    # Through int32, because converting a float directly to uint8 takes four times as long.
    _pack(bits, found.copy_(y.round_()).add_(1), y, work.codes)
    return True


def _pack(bits: int, found: Tensor, free: Tensor, codes: Tensor) -> None:
    """Pack codes: add the second half of each tile, times a power of two, to the first, until the length fits."""
    if bits == 8:
        codes.copy_(found)
        return
    small = free.view(codes.dtype).view(-1)[: found.numel()].view(found.shape).copy_(found)
    while (half := small.shape[1] // 2) > codes.shape[1]:
        small = small[:, :half].add_(small[:, half:], alpha=1 << bits * (half // codes.shape[1]))
    torch.add(small[:, :half], small[:, half:], alpha=1 << bits, out=codes)


def unpack(bits: int, signed: bool, codes: Tensor) -> Iterator[Tensor]:
    """Yield the codes of tiles, part by part from left to right; each part is valid until the next one."""
    if bits == 8:
        yield codes
        return
    offset = 1 << bits - 1 if signed else 0
    rest, piece = codes.clone(), torch.empty_like(codes)
    for _ in range(8 // bits - 1):
        yield torch.add(rest, offset, out=piece).bitwise_and_((1 << bits) - 1).sub_(offset)
        rest.sub_(piece).bitwise_right_shift_(bits)
    yield rest
