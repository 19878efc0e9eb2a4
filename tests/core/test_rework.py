import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_scar.core.rework import Motion, error_floor, iterations_bound, motion, rework_bound

SEED = st.integers(0, 2**32 - 1)
RATE = st.floats(0.3, 0.95)
SIZE = st.floats(1e-3, 1e3)
#: Distance, age and whether a save leaves it out, of each block.
BLOCKS = st.lists(
    st.tuples(st.sampled_from([0.0, 1e-6, 0.5, 1.0, 7.0, 1e6]), st.integers(0, 50), st.booleans()), max_size=30
)
Blocks = list[tuple[float, int, bool]]


def of(blocks: Blocks) -> Motion:
    distance, age, rest = zip(*blocks, strict=True) if blocks else ((), (), ())
    # Without a refresh they are as far behind as they are from their bases.
    moved = torch.tensor(distance, dtype=torch.float64)
    return motion(
        moved,
        moved,
        torch.tensor(age, dtype=torch.int64),
        torch.tensor(rest, dtype=torch.bool),
    )


def quadratic(rate: float, generator: torch.Generator) -> Tensor:
    """A step of gradient descent on a random 4-D quadratic with its optimum at 0, as a matrix of this norm."""
    vectors = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator))[0]
    values = (2 * torch.rand(4, dtype=torch.float64, generator=generator) - 1) * rate
    values[0] = rate
    return vectors @ values.diag() @ vectors.T


def of_length(length: float, generator: torch.Generator) -> Tensor:
    direction = torch.randn(4, dtype=torch.float64, generator=generator)
    return direction * (length / direction.norm())


# -- the bounds ------------------------------------------------------------------------------------------------------


@given(SEED, RATE, st.dictionaries(st.integers(0, 30), SIZE, max_size=5), st.floats(1e-4, 1e-1))
@settings(max_examples=60, deadline=None)
def test_a_perturbed_quadratic_is_within_the_tolerance_from_the_bound_on(
    seed: int, rate: float, perturbations: dict[int, float], tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    step = quadratic(rate, generator)
    y = of_length(1.0, generator)
    bound = iterations_bound(1.0, tolerance, perturbations, rate)
    for k in range(math.ceil(bound) + 10):
        if k >= bound:
            assert y.norm() <= tolerance * (1 + 1e-9)
        if k in perturbations:
            y = y + of_length(perturbations[k], generator)
        y = step @ y


@given(RATE, st.dictionaries(st.integers(0, 30), st.floats(1, 1e3), max_size=5), st.floats(1e-4, 1e-1))
def test_a_run_that_is_pushed_straight_away_needs_as_many_steps_as_the_bound_says(
    rate: float, perturbations: dict[int, float], tolerance: float
) -> None:
    bound = iterations_bound(1.0, tolerance, perturbations, rate)
    y, steps = 1.0, 0
    while y > tolerance * (1 + 1e-9) or steps <= max(perturbations, default=0):
        y, steps = rate * (y + perturbations.get(steps, 0.0)), steps + 1
    assert steps == pytest.approx(bound, abs=1 + 1e-6)


@given(RATE, SIZE, SIZE)
def test_the_rework_bound_is_what_a_perturbation_adds_to_the_iterations_bound(
    rate: float, distance: float, remaining: float
) -> None:
    tolerance = remaining / 10
    without = iterations_bound(remaining, tolerance, {}, rate)
    with_it = iterations_bound(remaining, tolerance, {0: distance}, rate)
    assert rework_bound(distance, remaining, rate) == pytest.approx(with_it - without, rel=1e-6, abs=1e-9)


@given(SIZE, st.floats(0.1, 10))
def test_of_slow_convergence_the_rework_bound_is_distance_over_step_length(steps: float, length: float) -> None:
    bounds = [rework_bound(steps * length, length / slow, 1 - slow) for slow in (1e-2, 1e-5, 1e-8)]
    errors = [abs(bound - steps) for bound in bounds]
    assert errors[-1] <= 1e-4 * steps
    assert all(later < earlier for earlier, later in pairwise(errors))


def test_perturbations_long_after_the_start_do_not_overflow() -> None:
    # Where the start does not matter any more, a perturbation of size 1 is as good as a new start there.
    late = iterations_bound(1.0, 1e-3, {100_000: 1.0}, 0.5)
    assert late == pytest.approx(100_000 + math.log(1e3) / math.log(2))


@given(SEED, RATE, SIZE)
@settings(max_examples=30, deadline=None)
def test_a_run_perturbed_at_every_step_comes_to_the_error_floor(seed: int, rate: float, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    step, y, worst = quadratic(rate, generator), torch.zeros(4, dtype=torch.float64), 0.0
    for _ in range(50):
        y, worst = step @ (y + of_length(size, generator)), rate * (worst + size)
        assert y.norm() <= error_floor(size, rate) * (1 + 1e-9)
    # Pushed straight away from the optimum it comes as near to the floor as the rate lets it.
    assert worst == pytest.approx(error_floor(size, rate) * (1 - rate**50))


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.5, 1.5, math.nan])
def test_a_rate_that_does_not_contract_is_named(rate: float) -> None:
    for bound in (
        lambda: rework_bound(1.0, 1.0, rate),
        lambda: iterations_bound(1.0, 1.0, {}, rate),
        lambda: error_floor(1.0, rate),
    ):
        with pytest.raises(ValueError, match="rate="):
            bound()


def test_other_arguments_out_of_range_are_named() -> None:
    for distance, remaining in ((-1.0, 1.0), (1.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="remaining="):
            rework_bound(distance, remaining, 0.5)
    for start, tolerance, size in ((0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, -1.0), (1.0, 1.0, math.nan)):
        with pytest.raises(ValueError, match="start="):
            iterations_bound(start, tolerance, {3: size}, 0.5)
    with pytest.raises(ValueError, match="distance="):
        error_floor(-1.0, 0.5)


# -- the estimate ----------------------------------------------------------------------------------------------------


@given(BLOCKS)
def test_the_estimate_is_at_most_distance_over_speed_and_the_oldest_age(blocks: Blocks) -> None:
    found = of(blocks)
    moving = [(distance, age, rest) for distance, age, rest in blocks if distance and age]
    left = [(distance, age) for distance, age, rest in moving if rest]
    assert (found.rework_cost > 0) == bool(left)
    if moving:
        distance = math.hypot(*(distance for distance, _ in left))
        assert found.rework_cost <= distance / found.squared_speed**0.5 * (1 + 1e-9)
        assert found.rework_cost <= max((age for _, age in left), default=0) * (1 + 1e-9)


@given(BLOCKS, BLOCKS)
def test_the_sum_is_the_motion_of_both_parts(some: Blocks, others: Blocks) -> None:
    total, both = of(some) + of(others), of(some + others)
    assert total.squared_speed == pytest.approx(both.squared_speed)
    assert total.rework_cost == pytest.approx(both.rework_cost)


@given(BLOCKS, st.sampled_from([1e-3, 1e4]))
def test_the_estimate_does_not_depend_on_the_scale_of_the_values(blocks: Blocks, scale: float) -> None:
    scaled = [(scale * distance, age, rest) for distance, age, rest in blocks]
    assert of(scaled).rework_cost == pytest.approx(of(blocks).rework_cost)


@given(SEED, st.floats(0.8, 0.999), st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_a_state_that_is_as_a_whole_some_steps_old_costs_these_steps(seed: int, rate: float, age: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    now = torch.randn(5, 8, dtype=torch.float64, generator=generator)
    distance = (now / rate**age - now).norm(dim=1)
    everything = torch.ones(5, dtype=torch.bool)
    assert motion(distance, distance, torch.full((5,), age), everything).rework_cost == pytest.approx(age)


@pytest.mark.parametrize("rate", [0.99, 0.999])
def test_of_gradient_descent_with_partial_saves_the_estimate_is_near_the_steps_that_the_loss_lost(rate: float) -> None:
    generator = torch.Generator().manual_seed(1)
    curvature = torch.rand(64, 4, dtype=torch.float64, generator=generator) * 0.9 + 0.1
    live = torch.randn(64, 4, dtype=torch.float64, generator=generator)
    saved, steps, losses, estimates, costs = live.clone(), torch.zeros(64), [], [], []
    for step in range(1, 401):
        losses.append(float((curvature * live.square()).sum()))
        live = live * (1 - (1 - rate) * curvature)
        if step % 4:
            continue
        distance, age = (live - saved).norm(dim=1), step - steps
        rest = torch.ones(64, dtype=torch.bool)
        rest[distance.topk(8).indices] = False
        saved[~rest], steps[~rest] = live[~rest], step
        if step >= 200:
            losses_now = [*losses, float((curvature * live.square()).sum())]
            loss_restored = float((curvature * saved.square()).sum())
            estimates.append(motion(distance, distance, age, rest).rework_cost)
            costs.append(step - next(k for k, loss in enumerate(losses_now) if loss <= loss_restored))
    mean = sum(costs) / len(costs)
    assert mean > 8
    assert sum(estimates) / len(estimates) == pytest.approx(mean, rel=0.15)


@given(BLOCKS, st.floats(1e-6, 1.0))
def test_a_refresh_never_makes_a_crash_dearer_and_an_exact_one_makes_it_free(blocks: Blocks, share: float) -> None:
    distance, age, rest = zip(*blocks, strict=True) if blocks else ((), (), ())
    moved, ages, left = torch.tensor(distance, dtype=torch.float64), torch.tensor(age), torch.tensor(rest).bool()
    without, near, exact = (
        motion(moved, lag, ages.long(), left) for lag in (moved, moved * share, torch.zeros_like(moved))
    )
    assert near.squared_speed == exact.squared_speed == without.squared_speed
    assert exact.rework_cost <= near.rework_cost <= without.rework_cost
    assert exact.rework_cost == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_blocks_at_no_finite_distance_are_left_out(bad: float) -> None:
    good: Blocks = [(3.0, 2, True), (5.0, 4, False)]
    assert of([*good, (bad, 7, True), (bad, 7, False)]) == of(good)


def test_blocks_of_age_0_show_no_speed() -> None:
    good: Blocks = [(3.0, 2, True), (5.0, 4, False)]
    assert of([*good, (9.0, 0, True)]) == of(good)


@pytest.mark.parametrize(
    "blocks", [[], [(0.0, 5, True)] * 3, [(1.0, 0, True)], [(math.inf, 3, True)], [(1e300, 1, True)] * 2]
)
def test_where_no_speed_is_known_nothing_is_estimated(blocks: Blocks) -> None:
    assert of(blocks).rework_cost == 0.0
