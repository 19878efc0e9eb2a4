"""Few bits for many values: what a refresh is written in, and how far it is from the truth.

A row of values is cut into tiles of at most 128. A tile has a scale or two of its own, and a code of 2, 4 or 8 bits for
each value. Decoding takes integer operations and one exact multiplication, so that every device and every library makes
the same bits of the same codes. Scales of signed values are not denormal, since some devices take those for zero.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_scar.core.tiles import Work, linear, log, log_step, may_look, measure_tiles, ternary, unpack

Kind = Literal["linear", "log"]
Bits = Literal[2, 4, 8]

#: Values of a tile at most. A scale of 16 bits then costs an eighth of a bit a value.
_TILE = 128
#: Values that are encoded at once on a CPU: scratch stays in the cache, and calls cost little in comparison.
_CHUNK = 1 << 19
#: The same on other devices: enough to keep one busy, and no more scratch than 256 MiB.
_LARGE_CHUNK = 1 << 24


@dataclass(frozen=True)
class Codec:
    r"""How values become codes.

    ``linear`` is for signed values. With 8 and 4 bits a code is a whole number from -127 to 127 or from -7 to 7, times
    the tile's scale: the largest magnitude divided by 127 or 7, rounded up by at most 1.2 %. No value is off by more
    than half a scale, or by more than its own magnitude. With 2 bits a code is -1, 0 or 1. Codes are zero up to half of
    :math:`\sum x^2 / \sum |x|`, and the scale is :math:`\sum x^2 / \sum |x|` again, but over the values with
    other codes in its denominator: then :math:`\sum x \hat x = \sum x^2`. Nothing is lost in the direction of the
    values; with the scale of the least squared error normal values would lose a fifth, and training that much of its
    way since the base. No value is off by more than the scale, at most twice the largest magnitude, or its own
    magnitude. The error of normal values is half of their norm (and 12 % with 4 bits). Zeros stay zeros with any bits.
    Scales are at least 2^-126.

    ``log`` is for values that are never negative. Code 0 is zero, and the others stand for floats whose bit patterns
    are evenly spaced from the tile's smallest to its largest positive value (rounded down and up to bfloat16), which is
    nearly even in the logarithm: from one power of two to the next there are 2^23 patterns. No pattern is off by more
    than half of the spacing, which is the range of patterns divided by 254, 14 or 2. So where the positive values are
    within a factor of 64, none is off by more than a factor of 1.02, 1.35 or 8. Zeros stay zeros, and a positive
    value becomes zero only in a tile with one below 2^-133.

    Attributes:
        kind: Which values.
        bits: Of a code.

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
        """What it is called in a delta, e.g. ``"linear4"``."""
        return f"{self.kind}{self.bits}"

    @classmethod
    def parse(cls, name: str) -> "Codec":
        """The inverse of :attr:`name`.

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
        """Bytes of the codes of a block of ``n`` values.

        Example::

            >>> Codec("linear", 4).code_bytes(100)
            52

        """
        return _tiles(n) * tile_length(n) * self.bits // 8

    def scale_count(self, n: int) -> int:
        """Scales of a block of ``n`` values: of each tile one, or two under ``log``, all lower ones first.

        Example::

            >>> Codec("linear", 4).scale_count(300), Codec("log", 4).scale_count(300)
            (3, 6)

        """
        return _tiles(n) * (2 if self.kind == "log" else 1)

    def empty(self, blocks: int, n: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Memory for the codes and scales of a matrix.

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
    """What a pass has seen, one element a block; all on the values' device.

    Squares are told in units, since those of large or small values are no float32: on the host the squared norm is
    ``squared_norm.double() * unit.double() ** 2``. Norm and error are right to about 1e-6 of the norm. All are NaN
    where the block is bad.

    Attributes:
        unit: float32.
        squared_norm: Of the values, in units squared; float32.
        squared_error: Of what :func:`decode` gives less the values, in units squared; float32.
        bad: Whether the block cannot be encoded: it has NaN, Inf, a value that no float32 holds, under ``log`` a value
            below zero or above 3.38e38, or with 2 bits one beyond 1.69e38. Its codes mean nothing then.

    """

    unit: Tensor
    squared_norm: Tensor
    squared_error: Tensor
    bad: Tensor


def tile_length(n: int) -> int:
    """Values of a tile of a block of ``n`` values: all tiles of a block are alike, and zeros fill the last one.

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
    """Encodes values, or their difference to a base, and measures them on the same pass.

    Without a codec they are measured only, as if all codes were zero. Nothing waits for the device.

    Args:
        codec: How, or ``None``.
        values: Shape ``(blocks, ...)``, at least one value a block; float64, float32, float16 or bfloat16; any layout.
        base: What to subtract, of the same shape, in the wider of both dtypes and float32.
        codes: Written: uint8 of shape ``(blocks, codec.code_bytes(n))``, contiguous, for blocks of ``n`` values.
        scales: Written: bfloat16 of shape ``(blocks, codec.scale_count(n))``, contiguous.
        measure: Whether squares are wanted. Without them it takes about two thirds of the time, and they are NaN.

    Raises:
        ValueError: If there is a codec, but nothing to write to.

    Example::

        >>> seen = encode(None, torch.tensor([[3e30, 4e30], [5.0, 5.0]]), torch.tensor([[0.0, 0.0], [5.0, 4.0]]))
        >>> (seen.squared_norm.double() * seen.unit.double() ** 2).sqrt()
        tensor([5.0000e+30, 1.0000e+00], dtype=torch.float64)

    """
    if codec is not None and (codes is None or scales is None):
        raise ValueError("a codec needs codes and scales to write to")
    blocks, tiles, length = len(values), _tiles(values[0].numel()), tile_length(values[0].numel())
    sizes, parts = _split([values] if base is None else [values, base], tiles, length)
    scratch = torch.empty(4, max(sizes), length, device=values.device)
    seen = torch.full((3, blocks * tiles), torch.nan, device=values.device)
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
    """The values that codes stand for.

    Args:
        codec: What they were encoded with.
        codes: uint8, shape ``(blocks, codec.code_bytes(n))``, contiguous.
        scales: bfloat16, shape ``(blocks, codec.scale_count(n))``, contiguous.
        n: Values of a block.
        out: Where to write them; ``None`` for new memory.

    Returns:
        float32, shape ``(blocks, n)``, contiguous.

    """
    blocks, tiles, length = len(codes), _tiles(n), tile_length(n)
    ready, signed = out if n == tiles * length else None, codec.kind == "linear"
    values = torch.empty(blocks * tiles, length, device=codes.device) if ready is None else ready.view(-1, length)
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
    """How many tiles to work on at once."""
    return min(tiles, (_CHUNK if device.type == "cpu" else _LARGE_CHUNK) // _TILE)


def _split(tensors: list[Tensor], tiles: int, length: int) -> tuple[list[int], Iterator[tuple[Tensor, ...]]]:
    """Cuts matrices into parts to work on, in the order of tiles; tells the tiles of each part."""
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
    """The tensors as matrices, if no tensor need be copied for that."""
    try:
        return [tensor.view(-1, width) for tensor in tensors]
    except RuntimeError:
        return None


def _load(part: Sequence[Tensor], x: Tensor) -> None:
    """Copies values, less the base if there is one, to tiles."""
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
