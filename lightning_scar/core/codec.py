"""Low-precision codecs of a refresh, and their errors.

A block's values are cut into tiles of at most 128. A tile has one or two scales, and a code of 2, 4 or 8 bits per
value. Decoding uses integer operations and one exact multiplication, so every device and library decodes to the same
bits. Scales of signed values are never denormal, because some devices flush denormals to zero.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_scar.core.tiles import Work, linear, log, log_step, may_look, measure_tiles, ternary, unpack

Kind = Literal["linear", "log"]
Bits = Literal[2, 4, 8]

#: The most values in a tile. A 16-bit scale then costs 1/8 bit per value.
_TILE = 128
#: Values encoded at once on a CPU: scratch memory fits in the cache, and the overhead of calls stays small.
_CHUNK = 1 << 19
#: The same on other devices: enough to keep the device busy, with at most 256 MiB of scratch memory.
_LARGE_CHUNK = 1 << 24


@dataclass(frozen=True)
class Codec:
    r"""A codec: how values become codes.

    ``linear`` is for signed values. With 8 or 4 bits, a code is an integer from -127 to 127 or from -7 to 7, times the
    tile's scale: the largest magnitude divided by 127 or 7, rounded up by at most 1.2 %. No error exceeds half a scale,
    or the value's own magnitude. With 2 bits, a code is -1, 0 or 1. It is 0 for magnitudes up to half of
    :math:`\sum x^2 / \sum |x|`. The scale is the same quotient with the denominator summed only over nonzero codes, so
    :math:`\sum x \hat x = \sum x^2`: the component along the values is exact. (With the scale of least squared error,
    normal values would lose a fifth of it, and a recovery that share of the training since the base.) No error exceeds
    the scale, at most twice the largest magnitude, or the value's own magnitude. The error of normal values is half of
    their norm (12 % with 4 bits). Zeros stay zeros with any bits. Scales are at least 2^-126.

    ``log`` is for values that are never negative. Code 0 is zero. The other codes stand for floats whose bit patterns
    are evenly spaced from the tile's smallest to its largest positive value (rounded down and up to bfloat16). This is
    nearly even in the logarithm, because each power of two has 2^23 patterns. No pattern is off by more than half of
    the spacing, which is the range of patterns divided by 254, 14 or 2. So if the positive values lie within a factor
    of 64, none is off by more than a factor of 1.02, 1.35 or 8. Zeros stay zeros, and a positive value becomes zero
    only in a tile with a value below 2^-133.

    Attributes:
        kind: The kind of values.
        bits: The bits of a code.

    Example::

        >>> codec = Codec("linear", 8)
        >>> codes, scales = codec.empty(blocks=1, n=8)
        >>> values = torch.tensor([[126.5, -3.0, 0.0, 1.4, 2.0, 0.0, 0.0, 0.0]])
        >>> encode(codec, values, codes=codes, scales=scales).bad
        tensor([False])
        >>> decode(codec, codes, scales, n=8)
        tensor([[126.,  -3.,   0.,   1.,   2.,   0.,   0.,   0.]])

    """

    kind: Kind
    bits: Bits

    @property
    def name(self) -> str:
        """The name in a delta, e.g. ``"linear4"``."""
        return f"{self.kind}{self.bits}"

    @classmethod
    def parse(cls, name: str) -> "Codec":
        """Return the codec of a :attr:`name`.

        Raises:
            ValueError: If there is no such codec.

        Example::

            >>> Codec.parse("log8")
            Codec(kind='log', bits=8)

        """
        for kind in get_args(Kind):
            for bits in get_args(Bits):
                if name == f"{kind}{bits}":
                    return cls(kind, bits)
        raise ValueError(f"there is no codec {name!r}")

    def code_bytes(self, n: int) -> int:
        """Return the bytes of the codes of a block of ``n`` values.

        Example::

            >>> Codec("linear", 4).code_bytes(100)
            52

        """
        return _tiles(n) * tile_length(n) * self.bits // 8

    def scale_count(self, n: int) -> int:
        """Return the number of scales of a block of ``n`` values: one per tile, two with ``log``, all lower ones first.

        Example::

            >>> Codec("linear", 4).scale_count(300), Codec("log", 4).scale_count(300)
            (3, 6)

        """
        return _tiles(n) * (2 if self.kind == "log" else 1)

    def empty(self, blocks: int, n: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Allocate memory for the codes and scales of a matrix.

        Returns:
            uint8 of shape ``(blocks, code_bytes(n))`` and bfloat16 of shape ``(blocks, scale_count(n))``.

        """
        codes = torch.empty(blocks, self.code_bytes(n), dtype=torch.uint8, device=device)
        return codes, torch.empty(blocks, self.scale_count(n), dtype=torch.bfloat16, device=device)

    def _write(self, work: "Work", measure: bool) -> None:
        if self.kind == "log":
            log(self.bits, work, measure)
        elif self.bits == 2:
            ternary(work, measure)
        else:
            linear(self.bits, work, measure)


class Measured(NamedTuple):
    """The measurements of a pass, one element per block, on the values' device.

    Squares are in units, because squares of large or small values do not fit in float32: the squared norm is
    ``squared_norm.double() * unit.double() ** 2``, computed on the host. Norm and error are accurate to about 1e-6 of
    the norm. All are NaN for a bad block.

    Attributes:
        unit: float32.
        squared_norm: The squared norm of the values, in units squared; float32.
        squared_error: The squared norm of :func:`decode`'s result minus the values, in units squared; float32.
        bad: Whether the block cannot be encoded: it has NaN, Inf, a value too large for float32, with ``log`` a value
            below zero or above 3.38e38, or with 2 bits one beyond 1.69e38. Its codes are then meaningless.

    """

    unit: Tensor
    squared_norm: Tensor
    squared_error: Tensor
    bad: Tensor


def tile_length(n: int) -> int:
    """Return the tile length of a block of ``n`` values, the same for all its tiles; zeros pad the last one.

    Example::

        >>> tile_length(100), tile_length(128), tile_length(129)
        (104, 128, 72)

    """
    return 8 * -(-n // (8 * _tiles(n)))


@torch.no_grad()
def encode(
    codec: Codec | None,
    values: Tensor,
    base: Tensor | None = None,
    *,
    codes: Tensor | None = None,
    scales: Tensor | None = None,
    measure: bool = True,
) -> Measured:
    """Encode values, or their difference to a base, and measure them in the same pass.

    Without a codec, only measure, as if all codes were zero. Does not synchronize with the device.

    Args:
        codec: The codec, or ``None``.
        values: Shape ``(blocks, ...)``, at least one value per block; float64, float32, float16 or bfloat16; any
            layout.
        base: What to subtract, of the same shape, in the widest of both dtypes and float32.
        codes: Output: uint8 of shape ``(blocks, codec.code_bytes(n))``, contiguous, for blocks of ``n`` values.
        scales: Output: bfloat16 of shape ``(blocks, codec.scale_count(n))``, contiguous.
        measure: Whether to compute squares. Without, they are NaN, and encoding takes about two thirds of the time.

    Raises:
        ValueError: If a codec is given without ``codes`` and ``scales``.

    Example::

        >>> seen = encode(None, torch.tensor([[3e30, 4e30], [5.0, 5.0]]), torch.tensor([[0.0, 0.0], [5.0, 4.0]]))
        >>> (seen.squared_norm.double() * seen.unit.double() ** 2).sqrt()
        tensor([5.0000e+30, 1.0000e+00], dtype=torch.float64)

    """
    if codec is not None and (codes is None or scales is None):
        raise ValueError("a codec needs codes and scales to write to")
    blocks, tiles, length = len(values), _tiles(values[0].numel()), tile_length(values[0].numel())
    sizes, parts = _split([values] if base is None else [values, base], tiles, length)
    # The data types are given everywhere: Lightning's precision plugins change the default one beside this thread.
    scratch = torch.empty(4, max(sizes), length, dtype=torch.float32, device=values.device)
    seen = torch.full((3, blocks * tiles), torch.nan, dtype=torch.float32, device=values.device)
    kept = torch.empty(2, blocks * tiles, dtype=torch.int16, device=values.device)
    make = measure_tiles if codec is None else codec._write
    packed = seen[0] if codes is None else codes.view(blocks * tiles, -1)
    outs = zip(torch.split(packed, sizes), torch.split(kept, sizes, 1), torch.split(seen, sizes, 1), strict=True)
    own = scratch
    for part, out in zip(parts, outs, strict=True):
        if own.shape[1] != len(out[0]):
            own = scratch[:, : len(out[0])]
        _load(part, own[0])
        make(Work(own[0], own[1], own[2], own[3], *out), measure)
    if codec is not None and scales is not None:
        into = scales.view(torch.int16).view(blocks, -1, tiles)
        into.copy_(kept[: into.shape[1]].view(-1, blocks, tiles).transpose(0, 1))
    units = seen[0].view(blocks, tiles)
    unit = units.amax(1)
    norm, error = (seen[1:].square_().view(2, blocks, tiles) * (units / unit.unsqueeze(1)).square_()).sum(2)
    return Measured(unit, norm, error, ~unit.isfinite())


@torch.no_grad()
def decode(codec: Codec, codes: Tensor, scales: Tensor, n: int, out: Tensor | None = None) -> Tensor:
    """Decode codes.

    Args:
        codec: The codec that encoded them.
        codes: uint8, shape ``(blocks, codec.code_bytes(n))``, contiguous.
        scales: bfloat16, shape ``(blocks, codec.scale_count(n))``, contiguous.
        n: The number of values in a block.
        out: Where to write the values; ``None`` for new memory.

    Returns:
        float32, shape ``(blocks, n)``, contiguous.

    """
    blocks, tiles, length = len(codes), _tiles(n), tile_length(n)
    ready, signed = out if n == tiles * length else None, codec.kind == "linear"
    if ready is None:
        values = torch.empty(blocks * tiles, length, dtype=torch.float32, device=codes.device)
    else:
        values = ready.view(-1, length)
    patterns = scales.view(torch.int16).to(torch.int32).view(blocks, -1, tiles).transpose(0, 1)
    first, *high = patterns.reshape(-1, len(values), 1)
    low, packed = first << 16, codes.view(torch.int8 if signed else torch.uint8).view(len(values), -1)
    found = values if signed else values.view(torch.int32)
    factor = low.view(torch.float32) if signed else (high[0] - first) * log_step(codec.bits)
    pieces = unpack(codec.bits, signed, packed)
    for piece, into in zip(pieces, torch.split(found, packed.shape[1], 1), strict=True):
        torch.mul(piece, factor, out=into)
        if not signed:
            into.add_(low - factor)
            if not may_look(piece) or int(piece.min()) == 0:
                into.mul_(torch.clamp(piece, max=1))
    trimmed = values.view(blocks, -1)[:, :n]
    if out is None:
        return trimmed.contiguous()
    return out if ready is not None else out.copy_(trimmed)


def _tiles(n: int) -> int:
    return -(-n // _TILE)


def _chunk_size(tiles: int, device: torch.device) -> int:
    """Return how many tiles to work on at once."""
    return min(tiles, (_CHUNK if device.type == "cpu" else _LARGE_CHUNK) // _TILE)


def _split(tensors: list[Tensor], tiles: int, length: int) -> tuple[list[int], Iterator[tuple[Tensor, ...]]]:
    """Split matrices into parts, in the order of tiles; return the number of tiles of each part, and the parts."""
    blocks, n, size = len(tensors[0]), tensors[0][0].numel(), _chunk_size(len(tensors[0]) * tiles, tensors[0].device)
    if n == tiles * length and (flat := _viewed(tensors, length)):
        sizes = [min(size, blocks * tiles - first) for first in range(0, blocks * tiles, size)]
        return sizes, zip(*(torch.split(each, size) for each in flat), strict=True)
    matrices = _viewed(tensors, n)
    height, width = max(1, size // tiles), min(size, tiles) if matrices else tiles
    sizes, parts = [], []
    for row in range(0, blocks, height):
        own = [each[row : row + height] for each in matrices or tensors]
        for column in range(0, tiles, width):
            sizes.append(len(own[0]) * (min(column + width, tiles) - column))
            places = slice(column * length, (column + width) * length)
            parts.append(tuple(each[:, places] if matrices else each for each in own))
    return sizes, iter(parts)


def _viewed(tensors: list[Tensor], width: int) -> list[Tensor] | None:
    """Return the tensors as matrices, ``None`` if that would need a copy."""
    try:
        return [tensor.view(-1, width) for tensor in tensors]
    except RuntimeError:
        return None


def _load(part: Sequence[Tensor], x: Tensor) -> None:
    """Copy values, minus the base if there is one, to tiles."""
    first, into = part[0], x
    if first.shape != x.shape:
        matrix, n = x.view(len(first), -1), first[0].numel()
        matrix[:, n:] = 0
        into = matrix[:, :n].view(first.shape)
    if len(part) == 1:
        into.copy_(first)
    elif first.dtype == part[1].dtype == torch.float32:
        torch.sub(first, part[1], out=into)
    elif torch.float64 in (first.dtype, part[1].dtype):
        into.copy_(first.to(torch.float64) - part[1])
    else:
        into.copy_(first).sub_(part[1])
