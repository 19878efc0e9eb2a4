import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_scar.core import distance
from lightning_scar.core.distance import Compared, is_finite
from lightning_scar.core.threads import team

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


def block_distances(live: Tensor, saved: Tensor, rows_per_block: int) -> Tensor:
    return distance.block_distances([Compared(live, saved, rows_per_block)])


def reference(live: Tensor, saved: Tensor, rows_per_block: int) -> Tensor:
    wide = torch.complex128 if live.is_complex() else torch.float64
    difference = live.to(wide) - saved.to(wide)
    return torch.stack([part.abs().square().sum().sqrt() for part in difference.split(rows_per_block)])


def largest_allocation(call: Callable[[], Any]) -> int:
    """Bytes of the largest piece of memory that one operation asked for and kept beyond its end."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return max(event.self_cpu_memory_usage for event in profile.events())


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple),
    rows_per_block=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 2),
)
def test_distances_are_those_of_float64_for_every_dtype_and_layout(
    shape: tuple[int, ...], rows_per_block: int, dtype: torch.dtype, layouts: tuple[str, str]
) -> None:
    live, saved = (LAYOUTS[layout](values(shape, dtype, seed)) for seed, layout in enumerate(layouts))
    found = block_distances(live, saved, rows_per_block)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, reference(live, saved, rows_per_block), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows_per_block", [1, 3, 100])
@pytest.mark.parametrize("dtype", FLOATS)
def test_long_rows_lose_no_precision(dtype: torch.dtype, rows_per_block: int) -> None:
    live, saved = values((5, 30_000), dtype, seed=1), values((5, 30_000), dtype, seed=2)
    found = block_distances(live, saved, rows_per_block)
    torch.testing.assert_close(found, reference(live, saved, rows_per_block), rtol=1e-5, atol=0)


@given(st.integers(1, 9), st.sampled_from([1, 300]), st.integers(1, 5), st.sampled_from([torch.float32, torch.float64]))
def test_the_way_for_other_devices_finds_the_same(rows: int, width: int, per_block: int, dtype: torch.dtype) -> None:
    live, saved = values((rows, width), dtype, seed=1), values((rows, width), dtype, seed=2)
    found = distance._squares_on_device(Compared(live, saved, per_block)).sqrt()
    torch.testing.assert_close(found, reference(live, saved, per_block), rtol=1e-5, atol=0)


def test_distances_come_tensor_after_tensor_and_in_any_number_of_threads() -> None:
    shapes = [(700, 2000), (5, 3), (40,), (2000, 700)]
    tensors = [Compared(values(s, torch.float32, 1), values(s, torch.float32, 2), 3) for s in shapes]
    tensors[1].live[4] = math.nan
    expected = torch.cat([reference(t.live, t.saved, 3) for t in tensors])
    for size in (1, 3):
        with team(size) as run:
            found = distance.block_distances(tensors, run)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_channels_last_weights_are_measured_like_others() -> None:
    live, saved = values((8, 3, 5, 5), torch.float32, 1), values((8, 3, 5, 5), torch.float32, 2)
    expected = reference(live, saved, 2)
    by_channel = live.to(memory_format=torch.channels_last), saved.to(memory_format=torch.channels_last)
    torch.testing.assert_close(block_distances(*by_channel, 2), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *COMPLEX], ids=str)
def test_differences_whose_squares_overflow_their_dtype_are_measured(dtype: torch.dtype) -> None:
    live, saved = torch.full((4, 2), 1e30).to(dtype), torch.zeros(4, 2).to(dtype)
    torch.testing.assert_close(block_distances(live, saved, 2), reference(live, saved, 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_tensors_are_at_distance_zero(dtype: torch.dtype) -> None:
    live = values((6, 3), dtype, seed=1)
    assert block_distances(live, live.clone(), 4).tolist() == [0, 0]


# -- NaN and Inf -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e5m2, *COMPLEX], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_that_turned_non_finite_is_nan_and_its_neighbours_are_not(dtype: torch.dtype, bad: float) -> None:
    saved = torch.ones(6, 2).to(dtype)
    live = torch.ones(6, 2)
    live[3, 1] = bad
    assert str(block_distances(live.to(dtype), saved, 2).tolist()) == "[0.0, nan, 0.0]"


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_causal_mask_counts_its_finite_changes_only(dtype: torch.dtype) -> None:
    saved = torch.full((4, 4), -math.inf).triu(1).to(dtype)
    live = saved.clone()
    assert block_distances(live, saved, 2).tolist() == [0, 0]
    live[3, 0] = 3.0
    live[3, 1] = 4.0
    assert block_distances(live, saved, 2).tolist() == [0, 5]


def test_a_change_between_non_finite_values_counts_as_one() -> None:
    saved = torch.tensor([-math.inf, math.nan, 1.0])
    live = torch.tensor([math.inf, math.nan, 1.0])
    assert block_distances(live, saved, 3).tolist() == [1]


def test_a_block_that_turned_finite_again_is_at_a_finite_distance() -> None:
    assert block_distances(torch.zeros(2), torch.tensor([math.nan, 0.0]), 2).tolist() == [1]


@given(st.sampled_from(DTYPES), st.integers(0, 11), st.sampled_from([1.0, math.nan, math.inf, -math.inf]))
def test_finiteness_is_that_of_torch(dtype: torch.dtype, place: int, value: float) -> None:
    tensor = torch.ones(12)
    if dtype not in [*INTEGERS, torch.bool]:
        tensor[place] = value
    tensor = tensor.to(dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    assert is_finite(tensor) == bool(tensor.to(wide).isfinite().all())


@pytest.mark.parametrize("dtype", COMPLEX)
def test_a_complex_number_with_large_parts_is_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype.to_real()).max
    assert is_finite(torch.full((3,), complex(largest, -largest), dtype=dtype))


# -- memory ----------------------------------------------------------------------------------------------------------

LARGE = {
    "float32": torch.zeros(2048, 1024),
    "bfloat16": torch.zeros(2048, 2048, dtype=torch.bfloat16),
    "one long row": torch.zeros(1, 2**22, dtype=torch.bfloat16),
    "vector": torch.zeros(2**21),
    "transposed": torch.zeros(1024, 2048).t(),
    "channels last": torch.zeros(256, 128, 8, 8).to(memory_format=torch.channels_last),
    "with NaN": torch.full((2048, 1024), math.nan),
    "with Inf": torch.full((2048, 1024), math.inf),
    "float8": torch.zeros(4096, 2048).to(torch.float8_e4m3fn),
    "complex": torch.zeros(1024, 1024, dtype=torch.complex64),
}


@pytest.mark.parametrize("live", LARGE.values(), ids=LARGE)
def test_no_temporary_has_the_size_of_a_parameter(live: Tensor) -> None:
    saved = torch.zeros_like(live)

    def measure() -> None:
        for rows_per_block in (64, 4096):
            block_distances(live, saved, rows_per_block)
        is_finite(live)

    assert largest_allocation(measure) < live.nbytes / 4


def test_the_measure_of_memory_sees_a_temporary() -> None:
    live = LARGE["float32"]
    assert largest_allocation(lambda: (live - live).norm()) >= live.nbytes
