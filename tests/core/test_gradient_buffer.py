import copy
import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor, nn

from lightning_scar.core import gradient_buffer as module
from lightning_scar.core.gradient_buffer import StaleGradientBuffer, StaleStep

SHAPES = [(3, 2), (4,), (), (2, 0)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]


def gradients(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def offer(
    buffer: StaleGradientBuffer, into: Sequence[Tensor], grads: Sequence[Tensor | None], samples: int = 1
) -> bool:
    for parameter, grad in zip(into, grads, strict=True):
        # A copy, for flushes write in place.
        parameter.grad = None if grad is None else grad.clone()
    return buffer.add(samples)


def value(parameter: Tensor) -> float:
    assert parameter.grad is not None
    return parameter.grad.flatten()[0].item()


def replayed(buffer: StaleGradientBuffer, parameter: Tensor, group: Any = None) -> list[tuple[float, int]]:
    """The first element of each step's gradient, and of how many contributions the step is."""
    return [(round(value(parameter), 5), step.contributions) for step in buffer.steps(group)]


def filled(values: Sequence[float], **kwargs: Any) -> tuple[StaleGradientBuffer, nn.Parameter]:
    """A buffer for one number, with contributions of one sample each."""
    parameter = nn.Parameter(torch.zeros(1))
    buffer = StaleGradientBuffer([parameter], **kwargs)
    for number in values:
        offer(buffer, [parameter], [torch.tensor([float(number)])])
    return buffer, parameter


# -- mean --------------------------------------------------------------------------------------------------------------


@given(
    samples=st.lists(st.integers(1, 1000), min_size=1, max_size=6),
    discount=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]),
)
def test_the_mean_is_that_of_float64(samples: list[int], discount: bool, dtype: torch.dtype) -> None:
    own = parameters(dtype)
    buffer = StaleGradientBuffer(own, discount=discount)
    offered = [gradients(seed, dtype) for seed in range(len(samples))]
    assert all(offer(buffer, own, grads, n) for grads, n in zip(offered, samples, strict=True))
    weights = [n / (1 + i) if discount else n for i, n in enumerate(samples)]
    (step,) = (step for step in buffer.steps())
    assert step == StaleStep(len(samples), sum(samples))
    reference = torch.complex128 if dtype.is_complex else torch.float64
    for i, parameter in enumerate(own):
        expected = sum(w * grads[i].to(reference) for w, grads in zip(weights, offered, strict=True)) / sum(weights)
        torch.testing.assert_close(parameter.grad, expected.to(dtype), rtol=torch.finfo(dtype).eps * 4, atol=1e-6)


@pytest.mark.parametrize(("batch", "sizes"), [(32, [8] * 4), (40, [1, 30, 9])])
def test_contributions_are_together_one_large_batch(batch: int, sizes: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs, targets = torch.randn(batch, 6).double(), torch.randint(0, 3, (batch,))
    whole = copy.deepcopy(model)
    nn.functional.cross_entropy(whole(inputs), targets).backward()
    buffer = StaleGradientBuffer(model.parameters())
    for x, y in zip(inputs.split(sizes), targets.split(sizes), strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        buffer.add(len(x))
    assert [step.samples for step in buffer.steps()] == [batch]
    for found, expected in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=1e-14)


def test_half_precision_is_added_up_in_float32() -> None:
    own = [nn.Parameter(torch.zeros(1, dtype=torch.float16))]
    buffer = StaleGradientBuffer(own)
    for _ in range(5000):
        # The sum is far beyond float16, and its last places are not in bfloat16 either.
        offer(buffer, own, [torch.full((1,), 60000.0, dtype=torch.float16)], samples=3)
    list(buffer.steps())
    assert own[0].grad is not None
    assert own[0].grad.dtype == torch.float16
    assert own[0].grad.item() == 60000


def test_add_leaves_the_gradients_as_they_are() -> None:
    own = parameters()
    grads = gradients(0)
    for parameter, grad in zip(own, grads, strict=True):
        parameter.grad = grad
    StaleGradientBuffer(own).add(7)
    for parameter, grad, before in zip(own, grads, gradients(0), strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, before)


def test_the_gradient_is_written_in_place_and_is_no_memory_of_the_buffer() -> None:
    buffer, parameter = filled([1.0, 3.0])
    of_ddp = parameter.grad
    assert replayed(buffer, parameter) == [(2.0, 2)]
    assert parameter.grad is of_ddp
    parameter.grad = None
    buffer.clear()
    offer(buffer, [parameter], [torch.tensor([5.0])])
    parameter.grad = None
    list(buffer.steps())
    assert parameter.grad is not None
    parameter.grad.fill_(math.nan)
    offer(buffer, [parameter], [torch.tensor([6.0])])
    assert replayed(buffer, parameter) == [(6.0, 1)]


@pytest.mark.parametrize("layout", ["channels last", "transposed", "expanded"])
def test_gradients_of_any_strides(layout: str) -> None:
    memory = {
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 6).t(),
        "expanded": torch.tensor(2.5).expand(3, 4),
    }[layout]
    parameter = nn.Parameter(torch.zeros_like(memory))
    parameter.grad = memory
    buffer = StaleGradientBuffer([parameter])
    buffer.add(2)
    parameter.grad = None
    list(buffer.steps())
    torch.testing.assert_close(parameter.grad, memory, check_stride=False)


def test_gradients_in_many_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BUCKET", 40)
    own = [nn.Parameter(torch.zeros(n, dtype=d)) for n in (3, 20, 1, 5) for d in (torch.float32, torch.bfloat16)]
    buffer = StaleGradientBuffer(own)
    for shift in (0.0, 2.0):
        offer(buffer, own, [torch.full_like(p, i + shift) for i, p in enumerate(own)])
    list(buffer.steps())
    for i, parameter in enumerate(own):
        assert torch.equal(parameter.grad, torch.full_like(parameter, i + 1.0))  # type: ignore[arg-type]


def test_an_unused_parameter_has_no_gradient_and_a_rarely_used_one_is_averaged_with_zeros() -> None:
    used, rarely, unused = own = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    optimizer = torch.optim.AdamW(own, lr=0.1, weight_decay=0.5)
    buffer = StaleGradientBuffer(own)
    offer(buffer, own, [torch.ones(1), None, None])
    offer(buffer, own, [torch.ones(1), torch.ones(1), None], samples=3)
    unused.grad = torch.ones(1)  # of some later backward
    for _ in buffer.steps():
        optimizer.step()
    assert (value(used), value(rarely), unused.grad) == (1.0, 0.75, None)
    assert unused.item() == 1.0, "weight decay must not touch it"
    assert rarely.item() < 1.0


# -- what is dropped ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_a_contribution_that_is_not_finite_leaves_no_trace(bad: float, place: int, dtype: torch.dtype) -> None:
    own = parameters(dtype)
    buffer = StaleGradientBuffer(own)
    good = gradients(1, dtype)
    assert offer(buffer, own, good, 3)
    damaged = gradients(2, dtype)
    damaged[place].view(-1)[-1] = bad
    assert not offer(buffer, own, damaged, 5)
    assert buffer.contributions == 1
    assert list(buffer.steps()) == [StaleStep(1, 3)]
    for parameter, expected in zip(own, good, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_large_gradients_are_finite() -> None:
    buffer, parameter = filled([])
    assert offer(buffer, [parameter], [torch.tensor([3e38])])
    assert buffer.contributions == 1
    assert not math.isinf(replayed(buffer, parameter)[0][0])


@pytest.mark.parametrize("mode", ["mean", "replay"])
def test_nothing_held_makes_no_step(mode: Any) -> None:
    buffer, parameter = filled([math.nan, math.inf], mode=mode)
    assert replayed(buffer, parameter) == []
    assert buffer.contributions == 0
    assert replayed(filled([], mode=mode)[0], parameter) == []


def test_contributions_without_any_gradient_are_held() -> None:
    own = parameters()
    buffer = StaleGradientBuffer(own)
    assert offer(buffer, own, [None] * len(own), 4)
    assert list(buffer.steps()) == [StaleStep(1, 4)]
    assert all(parameter.grad is None for parameter in own)


# -- staleness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 3])
def test_beyond_the_greatest_staleness_contributions_are_dropped(limit: int) -> None:
    buffer, parameter = filled([], max_staleness=limit)
    for i in range(limit + 3):
        assert buffer.is_full == (i > limit)
        assert offer(buffer, [parameter], [torch.ones(1)]) == (i <= limit)
    assert buffer.contributions == limit + 1
    buffer.clear()
    assert not buffer.is_full


def test_a_worker_whose_gradients_are_all_damaged_stops_too() -> None:
    buffer, _ = filled([math.nan] * 3, max_staleness=2)
    assert buffer.is_full


def test_without_a_limit_a_buffer_is_never_full() -> None:
    buffer, parameter = filled([1.0] * 100)
    assert not buffer.is_full
    assert replayed(buffer, parameter) == [(1.0, 100)]


# -- replay ------------------------------------------------------------------------------------------------------------


@given(offered=st.lists(st.tuples(st.floats(-10, 10, width=32) | st.just(math.nan), st.integers(1, 9)), max_size=20))
def test_a_replay_makes_a_step_of_each_but_the_last_ones_share_one(offered: list[tuple[float, int]]) -> None:
    buffer, parameter = filled([], mode="replay")
    for number, samples in offered:
        offer(buffer, [parameter], [torch.tensor([number])], samples)
    expected = []
    for part in (*([each] for each in offered[:7]), offered[7:]):
        held = [(number, n) for number, n in part if not math.isnan(number)]
        if held:
            total = sum(n for _, n in held)
            expected.append((sum(number * n for number, n in held) / total, StaleStep(len(held), total)))
    found = [(value(parameter), step) for step in buffer.steps()]
    assert [step for _, step in found] == [step for _, step in expected]
    assert [mean for mean, _ in found] == pytest.approx([mean for mean, _ in expected], rel=1e-5, abs=1e-4)
    assert buffer.contributions == 0


def test_a_discount_shortens_the_steps_of_a_replay() -> None:
    buffer, parameter = filled([1.0] * 3, mode="replay", discount=True)
    assert replayed(buffer, parameter) == [(1.0, 1), (0.5, 1), (round(1 / 3, 5), 1)]
    buffer, parameter = filled([1.0] * 4, discount=True)
    assert replayed(buffer, parameter) == [(1.0, 4)], "the length of the one step stays"


def test_steps_not_made_are_kept() -> None:
    buffer, parameter = filled(range(4), mode="replay")
    for i, _ in enumerate(buffer.steps()):
        if i == 2:
            break  # the optimizer failed in the third step
    assert buffer.contributions == 2
    assert replayed(buffer, parameter) == [(2.0, 1), (3.0, 1)]


def test_a_replay_is_the_same_as_the_steps_themselves() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    other = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, other)]
    held = [[torch.randn_like(p) for p in model.parameters()] for _ in range(5)]
    buffer = StaleGradientBuffer(model.parameters(), mode="replay")
    for grads in held:
        offer(buffer, list(model.parameters()), grads, 16)
        for parameter, grad in zip(other.parameters(), grads, strict=True):
            parameter.grad = grad
        optimizers[1].step()
    for _ in buffer.steps():
        optimizers[0].step()
    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


# -- memory ------------------------------------------------------------------------------------------------------------


def held_tensors(buffer: StaleGradientBuffer) -> set[tuple[int, int]]:
    return {(t.data_ptr(), t.nbytes) for each in buffer._sums for t in each.sums if t is not None and t.nbytes}


@pytest.mark.parametrize(("mode", "sets"), [("mean", 1), ("replay", 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_bounded_and_used_again(mode: Any, sets: int, dtype: torch.dtype) -> None:
    own = parameters(dtype)
    frozen = nn.Parameter(torch.zeros(1000, dtype=dtype), requires_grad=False)
    buffer = StaleGradientBuffer([*own, frozen], mode=mode)
    assert not held_tensors(buffer)
    seen = []
    for _ in range(2):
        for i in range(50):
            offer(buffer, [*own, frozen], [*gradients(i, dtype), None])
            seen.append(held_tensors(buffer))
        list(buffer.steps())
        seen.append(held_tensors(buffer))
    elements = sum(p.numel() for p in own)
    assert sum(nbytes for _, nbytes in seen[-1]) == sets * elements * 4, "float32, and nothing for frozen parameters"
    assert all(before <= after for before, after in pairwise(seen)), "memory was asked for anew"
    assert len(seen[0]) <= len(SHAPES)


def test_a_buffer_is_used_for_one_outage_after_the_other() -> None:
    buffer, parameter = filled([], mode="replay")
    for _ in range(3):
        for number in (1.0, 2.0, 6.0):
            offer(buffer, [parameter], [torch.tensor([float(number)])])
        assert replayed(buffer, parameter) == [(1.0, 1), (2.0, 1), (6.0, 1)]
    offer(buffer, [parameter], [torch.tensor([9.0])])
    assert replayed(buffer, parameter) == [(9.0, 1)]


# -- several ranks -----------------------------------------------------------------------------------------------------


def flushed(rank: int, offered: list[list[float]], **kwargs: Any) -> list[tuple[float, int]]:
    buffer, parameter = filled(offered[rank], **kwargs)
    found = replayed(buffer, parameter, dist.group.WORLD)
    assert buffer.contributions == 0
    return found


FLUSHES: dict[str, tuple[dict[str, Any], list[list[float]], list[tuple[float, int]]]] = {
    "mean": ({}, [[1.0, 2.0], [6.0], []], [(3.0, 3)]),
    "a discount": ({"discount": True}, [[1.0, 4.0], [7.0], []], [(4.0, 3)]),
    "damage on one": ({}, [[1.0, math.nan], [5.0]], [(3.0, 2)]),
    "only damage": ({}, [[math.nan], []], []),
    "replay": ({"mode": "replay"}, [[1.0, 2.0, 3.0], [5.0], []], [(3.0, 2), (2.0, 1), (3.0, 1)]),
    "a long replay": (
        {"mode": "replay"},
        [[float(i) for i in range(10)], [2.0, 3.0], [], [0.0, 0.0, 2.0]],
        [(0.66667, 3), (1.33333, 3), (2.0, 2), *((float(i), 1) for i in range(3, 7)), (8.0, 3)],
    ),
    "a replay in which nobody has the second": (
        {"mode": "replay"},
        [[1.0, math.nan, 3.0], [3.0, math.inf]],
        [(2.0, 2), (3.0, 1)],
    ),
}


@pytest.mark.parametrize("case", FLUSHES)
def test_ranks_average_over_all_contributors(case: str) -> None:
    kwargs, offered, expected = FLUSHES[case]
    assert run_ranks(flushed, len(offered), offered, **kwargs) == [expected] * len(offered)


def trains_on(rank: int, dtype: torch.dtype, mode: Any, bucket: int) -> list[Tensor]:
    module._BUCKET = bucket
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 1)).to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    buffer = StaleGradientBuffer(model.parameters(), mode=mode)
    for i in range([9, 3, 0][rank]):
        model.zero_grad()
        inputs = torch.randn(4 + rank, 7, generator=torch.Generator().manual_seed(100 * rank + i)).to(dtype)
        model(inputs).square().mean().backward()
        buffer.add(len(inputs))
    for _ in buffer.steps(dist.group.WORLD):
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    ("dtype", "mode", "bucket"),
    [(torch.float32, "replay", 1), (torch.bfloat16, "mean", 1 << 20), (torch.complex64, "mean", 1 << 20)],
)
def test_all_ranks_end_with_the_same_bits(dtype: torch.dtype, mode: str, bucket: int) -> None:
    if dtype.is_complex:
        first, *others = run_ranks(averages_complex, 3)
    else:
        first, *others = run_ranks(trains_on, 3, dtype, mode, bucket)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def averages_complex(rank: int) -> list[Tensor]:
    module._BUCKET = 1  # so that the empty parameter is in one of its own
    own = parameters(torch.complex64)
    buffer = StaleGradientBuffer(own)
    for i in range(rank):
        offer(buffer, own, gradients(10 * rank + i, torch.complex64), rank)
    list(buffer.steps(dist.group.WORLD))
    expected = [sum(n * g for n, g in zip((1, 2, 2), each, strict=True)) / 5 for each in zip(*OFFERED, strict=True)]
    found = [p.grad for p in own if p.grad is not None]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    return found


OFFERED = [gradients(seed, torch.complex64) for seed in (10, 20, 21)]


def uses_some(rank: int) -> list[float | None]:
    own = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    buffer = StaleGradientBuffer(own)
    offer(buffer, own, [torch.ones(2), torch.ones(2) if rank else None, None])
    # The last backward of one used the last one; the flush is not of it.
    own[2].grad = torch.ones(2)
    list(buffer.steps(dist.group.WORLD))
    return [None if p.grad is None else value(p) for p in own]


def test_a_parameter_used_on_one_rank_has_a_gradient_on_all() -> None:
    assert run_ranks(uses_some, 2) == [[1.0, 0.5, None]] * 2


def survives(rank: int) -> list[list[tuple[float, int]]]:
    """Rank 2 leaves after the first of three steps; the others go on as a smaller group."""
    buffer, parameter = filled([1.0 * rank, 10.0 * rank, 100.0 * rank], mode="replay")
    store = dist.distributed_c10d._get_default_store()
    steps = buffer.steps(dist.group.WORLD)
    next(steps)
    first = (value(parameter), 3)
    if rank == 2:
        dist.destroy_process_group()
        return [[first]]
    with pytest.raises(RuntimeError):
        next(steps)
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("next", store), rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    return [[first], replayed(buffer, parameter, dist.group.WORLD)]


def test_a_flush_goes_on_where_a_broken_group_left_it() -> None:
    rest = [(5.0, 2), (50.0, 2)]
    assert run_ranks(survives, 3) == [[[(1.0, 3)], rest], [[(1.0, 3)], rest], [[(1.0, 3)]]]


def mismatched(rank: int, forms: list[dict[str, Any]]) -> str:
    form = dict(forms[rank])
    buffer = StaleGradientBuffer([nn.Parameter(torch.zeros(form.pop("size", 3)))], **form)
    try:
        list(buffer.steps(dist.group.WORLD))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("other", [{"size": 4}, {"mode": "replay"}], ids=["shape", "mode"])
def test_buffers_that_do_not_match_are_refused_on_all_ranks(other: dict[str, Any]) -> None:
    errors = run_ranks(mismatched, 2, [{}, other])
    assert all("do not match: use the same parameters and mode on all ranks" in error for error in errors)


def test_without_a_process_group_the_default_is_this_process() -> None:
    assert dist.group.WORLD is None
    assert flushed(0, [[1.0, 3.0]]) == [(2.0, 2)]


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: filled([], mode="sum"), "mode='sum' must be one of ('mean', 'replay')"),
        (lambda: StaleGradientBuffer(iter([])), "parameters is empty"),
        (lambda: filled([])[0].add(0), "samples=0 must be at least 1"),
        (lambda: filled([])[0].add(-3), "samples=-3 must be at least 1"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    assert says in str(caught.value)


def test_sparse_gradients_are_refused_before_anything_is_held() -> None:
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Linear(2, 1))
    buffer = StaleGradientBuffer(list(model.parameters())[::-1])
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"parameter 2, shape \(5, 2\), has layout torch.sparse_coo.*sparse=False"):
        buffer.add(1)
    assert buffer.contributions == 0
    assert not held_tensors(buffer)
