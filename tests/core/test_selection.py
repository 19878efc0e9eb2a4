import dataclasses
import math
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_scar.core.selection import POLICIES, Candidates, Policy, distance, random, round_robin, select

#: Distance, bytes and age of each block.
Blocks = list[tuple[float, int, int]]
BLOCKS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0, 7.0, math.inf]), st.integers(1, 20), st.integers(0, 9)), max_size=30
)
POLICY = st.sampled_from(list(POLICIES.values()))
BUDGET = st.integers(0, 200)
MAX_AGE = st.one_of(st.none(), st.integers(0, 9))


def candidates(blocks: Blocks, step: int = 9) -> Candidates:
    moved, nbytes, age = zip(*blocks, strict=True) if blocks else ((), (), ())
    return Candidates(
        torch.tensor(moved, dtype=torch.float64),
        torch.tensor(nbytes, dtype=torch.int64),
        torch.tensor(age, dtype=torch.int64),
        step,
        torch.ones(len(blocks), dtype=torch.float64),
    )


@given(BLOCKS, POLICY, BUDGET, MAX_AGE)
def test_the_budget_is_never_exceeded_and_no_block_is_chosen_twice(
    blocks: Blocks, policy: Policy, budget: int, max_age: int | None
) -> None:
    chosen = select(candidates(blocks), policy, budget, max_age).tolist()
    assert len(set(chosen)) == len(chosen)
    assert sum(blocks[i][1] for i in chosen) <= budget


@given(BLOCKS, POLICY, BUDGET, MAX_AGE)
def test_nothing_that_still_fits_is_left_out(blocks: Blocks, policy: Policy, budget: int, max_age: int | None) -> None:
    chosen = select(candidates(blocks), policy, budget, max_age).tolist()
    left = budget - sum(blocks[i][1] for i in chosen)
    assert all(blocks[i][1] > left for i in range(len(blocks)) if i not in chosen)


@given(BLOCKS, BUDGET, MAX_AGE)
def test_blocks_are_taken_greedily_overdue_ones_first_then_by_squared_distance_per_byte(
    blocks: Blocks, budget: int, max_age: int | None
) -> None:
    def rank(i: int) -> tuple[float, ...]:
        moved, nbytes, age = blocks[i]
        if max_age is not None and age > max_age:
            return 0, -age, 0, i
        return 1, -moved * moved / nbytes, -age, i

    expected, left = [], budget
    for i in sorted(range(len(blocks)), key=rank):
        if blocks[i][1] <= left:
            expected.append(i)
            left -= blocks[i][1]
    assert select(candidates(blocks), distance, budget, max_age).tolist() == expected


@given(BLOCKS, BUDGET)
def test_round_robin_takes_the_oldest_first(blocks: Blocks, budget: int) -> None:
    ages = [blocks[i][2] for i in select(candidates([(m, 1, a) for m, _, a in blocks]), round_robin, budget)]
    assert ages == sorted((age for _, _, age in blocks), reverse=True)[:budget]


def test_ties_go_to_the_oldest_block() -> None:
    same = candidates([(1.0, 4, 2), (1.0, 4, 8), (1.0, 4, 5)])
    assert select(same, distance, budget=8).tolist() == [1, 2]


def test_at_distance_zero_the_oldest_block_is_taken() -> None:
    assert select(candidates([(0.0, 4, 1), (0.0, 4, 3), (0.0, 4, 2)]), distance, budget=4).tolist() == [1]


def test_overdue_blocks_stay_within_the_budget_oldest_first() -> None:
    blocks = candidates([(9.0, 4, 0), (0.0, 4, 6), (0.0, 4, 8), (0.0, 4, 7)])
    assert select(blocks, distance, budget=8, max_age=5).tolist() == [2, 3]
    assert select(blocks, distance, budget=16, max_age=5).tolist() == [2, 3, 1, 0]


def test_a_block_exactly_as_old_as_max_age_is_not_overdue() -> None:
    blocks = candidates([(9.0, 4, 0), (0.0, 4, 5)])
    assert select(blocks, distance, budget=4, max_age=5).tolist() == [0]
    assert select(blocks, distance, budget=4, max_age=4).tolist() == [1]


@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 6), st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_no_block_starves_under_max_age(n_blocks: int, per_save: int, max_age: int, rng: Random) -> None:
    saved = [0] * n_blocks
    rounds = math.ceil(n_blocks / per_save)
    for step in range(1, 40):
        # The first block never moves; the others always do.
        moved = [0.0, *(rng.random() + 1 for _ in range(n_blocks - 1))]
        blocks = [(far, 1, step - at) for far, at in zip(moved, saved, strict=True)]
        for i in select(candidates(blocks), distance, per_save, max_age):
            saved[i] = step
        assert step - min(saved) <= max_age + rounds


def test_without_max_age_a_block_that_rests_may_wait_for_ever() -> None:
    assert select(candidates([(0.0, 1, 1000), (1.0, 1, 0)]), distance, budget=1).tolist() == [1]


def test_random_is_the_same_for_the_same_step_and_differs_between_steps() -> None:
    blocks = candidates([(0.0, 1, 0)] * 50, step=3)
    again, later = candidates([(1.0, 1, 0)] * 50, step=3), dataclasses.replace(blocks, step=4)
    assert select(blocks, random, 10).tolist() == select(again, random, 10).tolist()
    assert select(blocks, random, 10).tolist() != select(later, random, 10).tolist()


def test_random_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    select(candidates([(0.0, 1, 0)] * 5), random, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_reaches_every_block_in_time() -> None:
    reached = {i for step in range(60) for i in select(candidates([(0.0, 1, 0)] * 8, step), random, 1).tolist()}
    assert reached == set(range(8))


def test_a_users_function_ranks_the_blocks() -> None:
    def youngest(blocks: Candidates) -> Tensor:
        return -blocks.age

    assert select(candidates([(9.0, 1, 5), (0.0, 1, 1), (0.0, 1, 3)]), youngest, budget=2).tolist() == [1, 2]


@pytest.mark.parametrize(
    "wrong", [torch.ones(2), torch.ones(3, 1), torch.tensor(1.0)], ids=lambda t: str(list(t.shape))
)
def test_a_function_that_does_not_rank_every_block_is_named(wrong: Tensor) -> None:
    def mistaken(blocks: Candidates) -> Tensor:
        return wrong

    with pytest.raises(ValueError, match=r"mistaken.*returned shape.*for 3 blocks.*one priority per block"):
        select(candidates([(1.0, 1, 1)] * 3), mistaken, budget=2)


def test_from_no_blocks_none_are_chosen() -> None:
    assert select(candidates([]), distance, budget=8).tolist() == []
