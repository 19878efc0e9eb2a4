import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_scar.core import codec as module
from lightning_scar.core.codec import Codec, Measured, decode, encode, tile_length

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
CODECS = [Codec(kind, bits) for kind in ("linear", "log") for bits in (2, 4, 8)]
SMALLEST = 2.0**-126

codecs = st.sampled_from(CODECS)
log = st.sampled_from(CODECS[3:])
#: Powers of two of a tile's values: ordinary ones, huge ones, and denormal ones.
exponents = st.sampled_from([0, -20, 20, -60, 60, 120, -120, -128, -140, -149])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in many parts."""
    monkeypatch.setattr(module, "_CHUNK", 512)


@st.composite
def matrices(draw: st.DrawFn, signed: bool | None = None) -> Tensor:
    """Rows of normal values, each with a size of its own, some of them zero, some rows all zero; float32."""
    blocks, n = draw(st.integers(1, 9)), draw(st.integers(1, 700))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    values = torch.randn(blocks, n, generator=generator, dtype=torch.float64).clamp_(-15, 15)
    if draw(st.booleans()):  # Of very different sizes within a tile.
        values *= torch.exp2(torch.randint(-30, 1, (blocks, n), generator=generator).double())
    values *= torch.tensor([[2.0 ** draw(exponents)] for _ in range(blocks)], dtype=torch.float64)
    values *= torch.rand(blocks, n, generator=generator) >= draw(st.sampled_from([0.0, 0.1, 0.9]))
    values *= torch.tensor([[draw(st.sampled_from([1.0, 1.0, 1.0, 0.0]))] for _ in range(blocks)])
    return (values if signed else values.abs()).float()


def encoded(codec: Codec, values: Tensor, base: Tensor | None = None) -> tuple[Tensor, Tensor, Measured]:
    codes, scales = codec.empty(len(values), values[0].numel())
    return codes, scales, encode(codec, values, base, codes=codes, scales=scales)


def round_trip(codec: Codec, values: Tensor, base: Tensor | None = None) -> tuple[Tensor, Measured]:
    codes, scales, seen = encoded(codec, values, base)
    return decode(codec, codes, scales, values[0].numel()), seen


def by_numpy(codec: Codec, codes: Tensor, scales: Tensor, n: int) -> Any:
    """The format, told once more in numpy."""
    length, pieces = tile_length(n), 8 // codec.bits
    packed = codes.numpy().reshape(len(codes), -1, length // pieces)
    patterns = scales.view(torch.int16).numpy().astype(np.int32).reshape(len(codes), -1, packed.shape[1], 1)
    signed = codec.kind == "linear"
    digits, rest = [], packed.view(np.int8 if signed else np.uint8).astype(np.int32)
    half = 1 << codec.bits - 1 if signed else 0
    for _ in range(pieces):
        digits.append(((rest + half) & ((1 << codec.bits) - 1)) - half)
        rest = (rest - digits[-1]) >> codec.bits
    found = np.concatenate(digits, axis=2)
    if signed:
        values = found.astype(np.float32) * (patterns[:, 0] << 16).view(np.float32)
    else:
        low, high = patterns[:, 0], patterns[:, 1]
        step = (high - low) * (65536 // ((1 << codec.bits) - 2))
        values = np.where(found > 0, (low << 16) + (found - 1) * step, 0).astype(np.int32).view(np.float32)
    return values.reshape(len(codes), -1)[:, :n]


def squared(seen: Measured) -> tuple[Tensor, Tensor]:
    units = seen.unit.double() ** 2
    return seen.squared_norm.double() * units, seen.squared_error.double() * units


def tiles(values: Tensor) -> Tensor:
    """Zeros added, shape ``(blocks, tiles, length)``."""
    length = tile_length(values.shape[1])
    return torch.nn.functional.pad(values, (0, -values.shape[1] % length)).unflatten(1, (-1, length))


def check_measured(seen: Measured, values: Tensor, found: Tensor) -> None:
    values, found = values.double(), found.double()
    norm, error = squared(seen)
    assert not seen.bad.any()
    # Of denormal values the squares may be too small for the unit.
    torch.testing.assert_close(norm, values.square().sum(1), rtol=1e-5, atol=SMALLEST**2)
    off = (error.sqrt() - (found - values).norm(dim=1)).abs()
    assert (off <= 1e-6 * norm.sqrt() + SMALLEST).all()


@given(matrices(signed=True), st.sampled_from(CODECS[1:3]))
@settings(deadline=None)
def test_linear_is_off_by_half_a_scale_at_most(values: Tensor, codec: Codec) -> None:
    found, seen = round_trip(codec, values)
    wide = tiles(values.double())
    scale = (wide.abs().amax(2, keepdim=True) / (2 ** (codec.bits - 1) - 1)).clamp(min=SMALLEST)
    off = (tiles(found.double()) - wide).abs()
    assert (off <= scale * (1.012 / 2)).all()
    assert (off <= wide.abs() * (1 + 1e-6)).all()
    assert (found[values == 0] == 0).all()
    check_measured(seen, values, found)


@given(matrices(signed=True))
@settings(deadline=None)
def test_two_bits_lose_nothing_in_the_direction_of_the_values(values: Tensor) -> None:
    codes, scales, seen = encoded(Codec("linear", 2), values)
    found = decode(Codec("linear", 2), codes, scales, values.shape[1])
    x, y, scale = tiles(values.double()), tiles(found.double()), scales.double().unsqueeze(2)
    squares = x.square().sum(2)
    ordinary = scale[..., 0] > SMALLEST
    torch.testing.assert_close((x * y).sum(2)[ordinary], squares[ordinary], rtol=2**-8, atol=0)
    assert (scale <= (x.abs().amax(2, keepdim=True) * 2.01).clamp(min=SMALLEST)).all()
    assert ((y - x).abs() <= torch.maximum(scale, x.abs())).all()
    middle = squares / x.abs().sum(2).clamp(min=1e-300)
    assert (y[x.abs() < middle.unsqueeze(2) * 0.4999] == 0).all()
    assert (y[(x.abs() > middle.unsqueeze(2) * 0.5001) & ordinary.unsqueeze(2)] != 0).all()
    assert (found[values == 0] == 0).all()
    check_measured(seen, values, found)


@given(matrices(), log)
@settings(deadline=None)
def test_log_is_off_by_half_a_spacing_of_patterns_at_most(values: Tensor, codec: Codec) -> None:
    found, seen = round_trip(codec, values)
    wide = tiles(values).view(torch.int32).long()
    high = (wide.amax(2, keepdim=True) + 0xFFFF) >> 16
    low = torch.where(wide > 0, wide, 1 << 31).amin(2, keepdim=True) >> 16
    spacing = (high - low) * 65536 / (2**codec.bits - 2)
    off = (tiles(found).view(torch.int32).long() - wide).abs()
    assert (off[wide > 0] <= (spacing * 0.5001).expand_as(off)[wide > 0]).all()
    assert (found[values == 0] == 0).all()
    assert (tiles(found)[(wide > 0) & (low > 0)] > 0).all()
    check_measured(seen, values, found)


@pytest.mark.parametrize(("bits", "factor"), [(8, 1.02), (4, 1.35), (2, 8.0)])
def test_log_is_off_by_the_factor_that_is_told(bits: Literal[2, 4, 8], factor: float) -> None:
    values = torch.exp2(torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) * 6 - 40)
    found, _ = round_trip(Codec("log", bits), values)
    ratio = torch.maximum(found / values, values / found)
    assert 1 < ratio.max() <= factor


@given(matrices(), codecs)
@settings(deadline=None)
def test_numpy_decodes_the_same_bits(values: Tensor, codec: Codec) -> None:
    codes, scales, _ = encoded(codec, values)
    found = decode(codec, codes, scales, values.shape[1])
    np.testing.assert_array_equal(
        found.numpy().view(np.int32), by_numpy(codec, codes, scales, values.shape[1]).view(np.int32)
    )


@given(st.integers(1, 5000), codecs)
def test_what_a_block_takes(n: int, codec: Codec) -> None:
    length = tile_length(n)
    count = math.ceil(n / 128)
    assert length <= 128
    assert length % 8 == 0
    assert n <= count * length < n + 8 * count
    assert codec.code_bytes(n) == count * length * codec.bits // 8
    assert codec.scale_count(n) == count * (1 + (codec.kind == "log"))


def test_a_sparse_row_of_one_magnitude_is_all_but_exact_in_two_bits() -> None:
    values = torch.zeros(1, 256)
    values[0, [3, 70, 200]] = torch.tensor([1.5, -1.5, 7.0])
    found, _ = round_trip(Codec("linear", 2), values)
    torch.testing.assert_close(found, values, rtol=2**-8, atol=0)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.5), (4, 0.12), (8, 0.007)])
def test_how_far_normal_values_are_off(bits: Literal[2, 4, 8], share: float) -> None:
    values = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    _, seen = round_trip(Codec("linear", bits), values)
    norm, error = squared(seen)
    assert 0.9 * share < (error.sum() / norm.sum()).sqrt() <= share


def layouts(values: Tensor) -> dict[str, Tensor]:
    """The same values, ``(blocks, a, b, c)``."""
    return {
        "contiguous": values,
        "transposed": values.transpose(0, 3).contiguous().transpose(0, 3),
        "channels last": values.contiguous(memory_format=torch.channels_last),
        "with gaps": torch.stack([values, values], dim=-1)[..., 0],
    }


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("shape", [(9, 2, 3, 4), (3, 8, 16, 16), (2, 7, 9, 11)])
def test_layouts_do_not_matter(codec: Codec, shape: tuple[int, ...]) -> None:
    live = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    base = live * 0.9
    expected = encoded(codec, live.flatten(1), base.flatten(1))
    for here in layouts(live).values():
        for there in layouts(base).values():
            for one, other in zip(expected, encoded(codec, here, there), strict=True):
                if isinstance(one, Tensor):
                    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
                else:
                    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("other", FLOATS)
@pytest.mark.parametrize("n", [100, 1024])
def test_differences_are_taken_in_the_wider_dtype(dtype: torch.dtype, other: torch.dtype, n: int) -> None:
    generator = torch.Generator().manual_seed(2)
    base = (torch.randn(5, n, generator=generator) + 100).to(other)
    live = (base.double() + torch.randn(5, n, generator=generator) / 100).to(dtype)
    difference = (live.double() - base.double()).float()
    for codec in (*CODECS[:3], None):
        if codec is None:
            seen, expected = encode(None, live, base), encode(None, difference)
        else:
            (*written, seen), (*wanted, expected) = encoded(codec, live, base), encoded(codec, difference)
            assert all(torch.equal(one, two) for one, two in zip(written, wanted, strict=True))
        assert all(torch.equal(one, two) for one, two in zip(seen, expected, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_values_of_any_float_dtype(dtype: torch.dtype, codec: Codec) -> None:
    values = torch.rand(3, 130, generator=torch.Generator().manual_seed(3)).to(dtype)
    found, seen = round_trip(codec, values)
    assert torch.equal(found, round_trip(codec, values.float())[0])
    check_measured(seen, values.float(), found)


@given(matrices(signed=True))
@settings(deadline=None)
def test_without_a_codec_the_error_is_the_norm(values: Tensor) -> None:
    seen = encode(None, values)
    check_measured(seen, values, torch.zeros_like(values))
    assert torch.equal(seen.squared_norm, seen.squared_error)


@pytest.mark.parametrize("codec", [*CODECS, None], ids=str)
@pytest.mark.parametrize("worst", [math.nan, math.inf, -math.inf, 1e39, -1e39, -1.0])
@pytest.mark.parametrize("n", [1, 300])
@pytest.mark.parametrize("measure", [True, False])
def test_what_cannot_be_encoded_is_flagged_block_by_block(
    codec: Codec | None, worst: float, n: int, measure: bool
) -> None:
    values = torch.rand(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    values[2, n // 2] = worst
    codes, scales = codec.empty(4, n) if codec else (None, None)
    seen = encode(codec, values, codes=codes, scales=scales, measure=measure)
    is_bad = worst != -1.0 or (codec is not None and codec.kind == "log")
    assert seen.bad.tolist() == [False, False, is_bad, False]
    assert seen.squared_norm.isnan().tolist() == [not measure, not measure, is_bad or not measure, not measure]


def test_a_damaged_difference_is_flagged() -> None:
    live, base = torch.ones(2, 8), torch.tensor([[1.0], [math.inf]]).expand(2, 8)
    assert encoded(Codec("linear", 4), live, base)[2].bad.tolist() == [False, True]
    assert encode(None, torch.full((1, 8), 3e38), torch.full((1, 8), -3e38)).bad.tolist() == [True]


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_minus_zero_is_zero(codec: Codec) -> None:
    values = torch.tensor([[-0.0, 0.0, 1.0, 1.0]])
    found, seen = round_trip(codec, values)
    assert not seen.bad.any()
    torch.testing.assert_close(found, values, rtol=2**-7, atol=0)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_without_measuring_the_codes_are_the_same(codec: Codec) -> None:
    values = torch.rand(4, 300, generator=torch.Generator().manual_seed(5), requires_grad=True)
    codes, scales, _ = encoded(codec, values)
    again = codec.empty(4, 300)
    encode(codec, values, codes=again[0], scales=again[1], measure=False)
    assert torch.equal(codes, again[0])
    assert torch.equal(scales, again[1])


def test_a_codec_needs_somewhere_to_write() -> None:
    with pytest.raises(ValueError, match="codes and scales"):
        encode(Codec("linear", 8), torch.ones(1, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_gpu_decodes_the_same_bits(codec: Codec) -> None:
    values = torch.rand(7, 1000, generator=torch.Generator().manual_seed(6))
    codes, scales, seen = encoded(codec, values)
    on_device = codes.cuda(), scales.cuda()
    assert torch.equal(decode(codec, *on_device, 1000).cpu(), decode(codec, codes, scales, 1000))
    encode_there = encode(codec, values.cuda(), codes=on_device[0], scales=on_device[1])
    torch.testing.assert_close(encode_there.squared_error.cpu(), seen.squared_error, rtol=1e-3, atol=0)
