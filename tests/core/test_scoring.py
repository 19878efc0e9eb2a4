"""One pass over live tensors: distances to the bases, codes of the difference, and what is not finite."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_helpers import bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_scar.core.bases import Base, Seen
from lightning_scar.core.blocks import BlockMap, Group, Slot
from lightning_scar.core.codec import Codec, decode
from lightning_scar.core.devices import HostBuffer
from lightning_scar.core.passes import plan_passes, provide_codes
from lightning_scar.core.save import Part
from lightning_scar.core.scoring import Scores, careful, score

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FLOAT8S = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
COMPLEX = [torch.complex64, torch.complex128]
DTYPES = [*FLOATS, *FLOAT8S, *INTEGERS, *COMPLEX, torch.bool]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.clone().transpose(0, -1).contiguous().transpose(0, -1),
    "with gaps": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "reversed dimensions": lambda x: x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1]),
}


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.complex128) * 3
    if dtype.is_complex:
        return wide.to(dtype)
    if dtype == torch.bool:
        return wide.real > 0
    return wide.real.abs().floor().to(dtype) if dtype in INTEGERS else wide.real.to(dtype)


def group_of(live: Tensor, rows_per_block: int, *state: str, frozen: bool = False) -> Group:
    slots = tuple(Slot(slot, live.dtype, None, ()) for slot in ("param", *state))
    return Group("w", tuple(live.shape), slots, rows_per_block, lazy=True, frozen=frozen)


def scores_of(
    live: Tensor | list[Tensor], base: Tensor | Base | None, rows_per_block: int, full: bool = False, **codecs: Codec
) -> tuple[Scores, Part]:
    """The scores of a group; codecs by slot."""
    tensors = live if isinstance(live, list) else [live]
    seen = base if isinstance(base, Base) else Base(base)
    state = ["exp_avg", "exp_avg_sq"][: len(tensors) - 1]
    part = Part(group_of(tensors[0], rows_per_block, *state, frozen=seen.values is None), tensors)
    return score_all([(part, seen)], codecs, full), part


def score_all(parts: list[tuple[Part, Base]], codecs: dict[str, Codec], full: bool = False) -> Scores:
    """The scores of several groups, all with the same codecs."""
    block_map = BlockMap(tuple(part.group for part, _ in parts), 0)
    passes = plan_passes(block_map, parts, {part.group.name: codecs for part, _ in parts}, full)
    codes = provide_codes(passes, [part for part, _ in parts], HostBuffer())
    return Scores.of(score(block_map, parts, passes, codes, 1))


def distances(live: Tensor, base: Tensor, rows_per_block: int) -> Tensor:
    return scores_of(live, base, rows_per_block)[0].distance


def reference(live: Tensor, base: Tensor, rows_per_block: int) -> Tensor:
    """By the squares of differences; of integers, how many have changed."""
    if live.dtype in INTEGERS or live.dtype == torch.bool:
        difference = (live != base).double()
    else:
        wide = torch.complex128 if live.is_complex() else torch.float64
        difference = live.to(wide) - base.to(wide)
    return torch.stack([part.abs().square().sum().sqrt() for part in difference.split(rows_per_block)])


# -- distances -------------------------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple),
    rows_per_block=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 2),
)
def test_distances_are_those_of_float64_for_every_dtype_and_layout(
    shape: tuple[int, ...], rows_per_block: int, dtype: torch.dtype, layouts: tuple[str, str]
) -> None:
    live, base = (LAYOUTS[layout](values(shape, dtype, seed)) for seed, layout in enumerate(layouts))
    found = distances(live, base, rows_per_block)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, reference(live, base, rows_per_block), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("rows_per_block", [1, 3, 100])
@pytest.mark.parametrize("dtype", FLOATS)
def test_long_rows_lose_no_precision(dtype: torch.dtype, rows_per_block: int) -> None:
    live, base = values((5, 30_000), dtype, seed=1), values((5, 30_000), dtype, seed=2)
    expected = reference(live, base, rows_per_block)
    torch.testing.assert_close(distances(live, base, rows_per_block), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *COMPLEX], ids=str)
def test_differences_whose_squares_are_beyond_their_dtype_are_measured(dtype: torch.dtype, size: float) -> None:
    live, base = torch.full((4, 2), size).to(dtype), torch.zeros(4, 2).to(dtype)
    torch.testing.assert_close(distances(live, base, 2), reference(live, base, 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_tensors_are_at_distance_zero(dtype: torch.dtype) -> None:
    live = values((6, 3), dtype, seed=1)
    assert distances(live, live.clone(), 4).tolist() == [0, 0]


# -- NaN and Inf -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e5m2, *COMPLEX], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("full", [False, True])
def test_a_block_that_turned_non_finite_is_nan_and_its_neighbours_are_not(
    dtype: torch.dtype, bad: float, full: bool
) -> None:
    base = torch.ones(6, 2).to(dtype)
    live = torch.ones(6, 2)
    live[3, 1] = bad
    scores, _ = scores_of(live.to(dtype), base, 2, full)
    assert str(scores.distance.tolist()) == ("[inf, nan, inf]" if full else "[0.0, nan, 0.0]")


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_causal_mask_is_far_away_only_where_it_changes(dtype: torch.dtype) -> None:
    base = torch.full((4, 4), -math.inf).triu(1).to(dtype)
    live = base.clone()
    group = group_of(live, 2)
    assert distances(live, base, 2).isnan().all()
    assert [careful(group, i, live, base).item() for i in range(2)] == [0, 0]
    live[3, 0] = 3.0
    assert [careful(group, i, live, base).item() for i in range(2)] == [0, 1]


def test_with_care_what_has_just_turned_bad_is_told_from_what_was_bad_before() -> None:
    good, bad, worse = torch.zeros(3), torch.tensor([math.nan, 0.0, 0.0]), torch.tensor([math.nan, math.inf, 0.0])
    group = group_of(good, 3)
    assert math.isnan(careful(group, 0, bad, good).item()), "a good version is not written over"
    assert careful(group, 0, good, bad).item() == math.inf, "a good one is wanted at once"
    assert careful(group, 0, bad, bad.clone()).item() == 0
    assert careful(group, 0, worse, bad).item() == 1
    assert careful(group, 0, torch.full((3,), 3e38), torch.full((3,), -3e38)).item() == math.inf


def test_a_difference_beyond_float32_is_looked_at_with_care() -> None:
    assert distances(torch.full((2, 2), 3e38), torch.full((2, 2), -3e38), 1).isnan().all()


# -- the refresh -------------------------------------------------------------------------------------------------------


@given(
    shape=st.sampled_from([(9, 70), (5, 3, 3, 3), (300,), (4, 130)]),
    rows_per_block=st.integers(1, 9),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(list(LAYOUTS)),
    number_of_bits=st.sampled_from([2, 4, 8]),
)
def test_the_error_is_that_of_base_and_decoded_codes(
    shape: tuple[int, ...], rows_per_block: int, dtype: torch.dtype, layout: str, number_of_bits: Any
) -> None:
    live, base = LAYOUTS[layout](values(shape, dtype, 1)), values(shape, dtype, 2)
    codec = Codec("linear", number_of_bits)
    scores, part = scores_of(live, base, rows_per_block, param=codec)
    errors = []
    difference = live.double() - base.double()
    for number, (codes, scales) in enumerate(one_by_one(part, "param")):
        rows = slice(*part.group.span(number))
        decoded = decode(codec, codes, scales, difference[rows].numel()).view_as(difference[rows])
        errors.append((difference[rows] - decoded).norm())
    torch.testing.assert_close(scores.error, torch.stack(errors), rtol=1e-3, atol=1e-5)
    assert bool((scores.error <= scores.distance).all())
    assert not scores.unfit.any()


def one_by_one(part: Part, slot: str) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales of every block, as matrices of one row."""
    found = []
    for _, (codes, scales) in sorted(part.codes[slot].pieces.items()):
        found += [(codes[i : i + 1], scales[i : i + 1]) for i in range(len(codes))]
    return found


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("slot", [0, 1, 2])
def test_a_block_with_nan_in_any_slot_has_no_refresh(slot: int, bad: float) -> None:
    live = [torch.rand(6, 40) for _ in range(3)]
    live[slot][3, 7] = bad
    codecs = {"param": Codec("linear", 4), "exp_avg": Codec("linear", 8), "exp_avg_sq": Codec("log", 4)}
    scores, _ = scores_of(live, torch.zeros(6, 40), 2, **codecs)
    assert scores.unfit.tolist() == [0, 1, 0]


def test_a_negative_value_where_there_was_none_has_no_refresh() -> None:
    live = [torch.rand(4, 40), torch.rand(4, 40), torch.rand(4, 40)]
    live[2][1, 5] = -1e-20
    scores, _ = scores_of(live, torch.zeros(4, 40), 2, param=Codec("linear", 4), exp_avg_sq=Codec("log", 2))
    assert scores.unfit.tolist() == [1, 0]


def test_a_value_that_no_float32_holds_has_no_refresh() -> None:
    live = torch.ones(4, 40, dtype=torch.float64)
    live[2, 3] = 1e300
    scores, _ = scores_of(live, torch.zeros_like(live), 1, param=Codec("linear", 4))
    assert scores.unfit.tolist() == [0, 0, 1, 0]


# -- frozen and new ----------------------------------------------------------------------------------------------------


def test_a_frozen_tensor_is_at_distance_zero_until_it_changes() -> None:
    live = torch.randn(6, 4)
    base = Base(None, Seen.of(live))
    for full in (False, True):
        assert scores_of(live, base, 2, full)[0].distance.tolist() == [0, 0, 0]
        assert scores_of(live.clone(), base, 2, full)[0].distance.tolist() == [math.inf] * 3
    live[5, 3] += 1
    assert scores_of(live, base, 2)[0].distance.tolist() == [math.inf] * 3


def test_what_was_never_looked_at_is_infinitely_far() -> None:
    assert scores_of(torch.ones(4, 2), Base(), 2)[0].distance.tolist() == [math.inf] * 2


def test_the_squared_gradients_are_told_where_the_optimizer_keeps_them() -> None:
    live = [torch.ones(4, 3), torch.ones(4, 3), torch.arange(4.0)[:, None].expand(4, 3).contiguous()]
    assert scores_of(live, torch.zeros(4, 3), 1)[0].squares.tolist() == [0, 1, 2, 3]
    assert scores_of(live[:1], torch.zeros(4, 3), 1)[0].squares.isnan().all()


# -- memory ------------------------------------------------------------------------------------------------------------

LARGE = {
    "float32": torch.zeros(4096, 1024),
    "bfloat16": torch.zeros(4096, 2048, dtype=torch.bfloat16),
    "one long row": torch.zeros(1, 2**23, dtype=torch.bfloat16),
    "vector": torch.zeros(2**22),
    "channels last": torch.zeros(4096, 128, 4, 4).to(memory_format=torch.channels_last),
    "with NaN": torch.full((4096, 1024), math.nan),
}


def largest_allocation(call: Callable[[], Any]) -> int:
    """Bytes of the largest piece of memory that one operation asked for and kept beyond its end."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("live", LARGE.values(), ids=LARGE)
def test_no_temporary_has_the_size_of_a_parameter(live: Tensor) -> None:
    base = torch.zeros_like(live)

    def measure() -> None:
        for rows_per_block in (64, 512):
            distances(live, base, rows_per_block)

    # Scratch of a chunk, whatever the size of the parameter.
    assert largest_allocation(measure) < live.nbytes * 0.6


def test_the_measure_of_memory_sees_a_temporary() -> None:
    live = LARGE["float32"]
    assert largest_allocation(lambda: (live - live).norm()) >= live.nbytes


def test_scoring_changes_neither_live_tensors_nor_bases() -> None:
    live, base = values((9, 50), torch.float32, 1), values((9, 50), torch.float32, 2)
    before = bits(live).clone(), bits(base).clone()
    scores_of(live, base, 2, param=Codec("linear", 4))
    assert torch.equal(bits(live), before[0])
    assert torch.equal(bits(base), before[1])


def test_groups_that_are_looked_at_together_are_seen_as_each_alone() -> None:
    torch.manual_seed(0)
    shapes = [(64, 16), (7, 16), (300,), (64, 16), (5000, 40), (64, 16), (1, 16)]
    parts = []
    for i, shape in enumerate(shapes):
        group = Group(f"w{i}", shape, (Slot("param", torch.float32, None, ()),), rows_per_block=4, lazy=True)
        parts.append((Part(group, [torch.randn(shape)]), Base(torch.randn(shape))))
    parts[3][0].live[0][5] = torch.nan
    codecs = {"param": Codec("linear", 4)}
    together, done = score_all(parts, codecs), 0
    for part, base in parts:
        own = slice(done, done := done + len(part.group))
        alike = Part(part.group, part.live)
        alone = score_all([(alike, base)], codecs)
        assert torch.equal(alone.unfit, together.unfit[own])
        for each, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(each, all_of_them[own], equal_nan=True)
        for number, (codes, others) in enumerate(
            zip(one_by_one(part, "param"), one_by_one(alike, "param"), strict=True)
        ):
            if not alone.unfit[number]:
                assert torch.equal(codes[0], others[0])
                assert torch.equal(codes[1], others[1])
