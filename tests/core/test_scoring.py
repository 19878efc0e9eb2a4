import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from core_helpers import save_tensors
from torch import Tensor

from lightning_scar.core.last_saved import NEVER
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.scoring import Choice, Scorer
from lightning_scar.core.selection import Candidates, distance
from lightning_scar.core.settings import Settings


class Saved:
    """Two tensors of four rows, saved at step 1 in blocks of one row."""

    def __init__(self, url: str) -> None:
        self.a, self.b = torch.zeros(4, 2), torch.zeros(4, 2)
        self.running = RunningCheckpoint(url, Settings(fraction=1.0, block_size=8))
        save_tensors(self.running, 1, a=self.a, b=self.b)

    @property
    def last(self) -> Any:
        return self.running._stager.last

    def choose(
        self, budget: int | None = None, groups: tuple[int, ...] = (0, 1), failed: tuple[str, ...] = (), **settings: Any
    ) -> Choice:
        scorer = Scorer(Settings(**settings), self.running.store)
        return scorer.choose(self.last, [[self.a], [self.b]], groups, 5, budget, failed)


@pytest.fixture
def saved(memory_url: str) -> Iterator[Saved]:
    state = Saved(memory_url)
    with state.running:
        yield state


def test_nothing_is_written_of_what_did_not_change(saved: Saved) -> None:
    choice = saved.choose()
    assert (choice.blocks.tolist(), choice.nbytes, choice.squared_rest, choice.oldest_age) == ([], 0, 0.0, 0)


def test_without_a_budget_every_changed_block_is_chosen(saved: Saved) -> None:
    saved.a[1] += 1
    saved.b[3] += 1
    choice = saved.choose()
    assert choice.blocks.tolist() == [1, 7]
    assert choice.nbytes == 16
    assert choice.by_group(saved.last.map) == {0: [1], 1: [3]}


def test_within_a_budget_the_furthest_are_chosen_and_the_rest_is_reported(saved: Saved) -> None:
    saved.a[0], saved.a[1, 0], saved.b[2, 0] = 5.0, 3.0, 4.0
    choice = saved.choose(budget=8)
    assert choice.blocks.tolist() == [0]
    assert choice.squared_rest == 25.0
    assert choice.oldest_age == 4


def test_a_budget_smaller_than_a_block_still_buys_one(saved: Saved) -> None:
    saved.a += 1
    assert len(saved.choose(budget=0).blocks) == 1


def test_only_the_asked_groups_are_chosen_from(saved: Saved) -> None:
    saved.a += 1
    saved.b += 1
    assert saved.choose(groups=(1,)).blocks.tolist() == [4, 5, 6, 7]


def test_blocks_that_were_never_saved_are_chosen_beyond_any_budget(saved: Saved) -> None:
    saved.last.forget(["state_dict/a[2:3]", "state_dict/b[0:1]"])
    saved.a += 1
    assert saved.last.steps[2] == NEVER
    assert {2, 4} <= set(saved.choose(budget=8).blocks.tolist())


def test_a_failed_write_is_infinitely_far_until_it_is_on_disk(saved: Saved) -> None:
    saved.a[0] = 1e6
    choice = saved.choose(budget=8, failed=("state_dict/b[1:2]",))
    assert choice.blocks.tolist() == [5]
    assert choice.squared_rest == pytest.approx(2e12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_block_is_counted_and_never_chosen(saved: Saved, bad: float) -> None:
    saved.a[0], saved.a[1, 1] = 1.0, bad
    for choice in (saved.choose(), saved.choose(budget=64), saved.choose(failed=("state_dict/a[1:2]",))):
        assert choice.blocks.tolist() == [0]
        assert choice.non_finite == 1
        assert choice.squared_rest == 0


def test_bits_that_changed_at_distance_zero_are_noticed(saved: Saved) -> None:
    saved.a[3].neg_()
    saved.b[0] = 1e-30
    assert saved.choose().blocks.tolist() == [3, 4]


def test_the_policy_sees_distance_bytes_age_and_step_of_the_blocks_that_changed(saved: Saved) -> None:
    seen: list[Candidates] = []

    def watched(candidates: Candidates) -> Tensor:
        seen.append(candidates)
        return distance(candidates)

    saved.a[1, 0], saved.b[2, 1] = 3.0, -4.0
    saved.choose(budget=64, policy=watched)
    [candidates] = seen
    assert candidates.distance.tolist() == [3.0, 4.0]
    assert candidates.nbytes.tolist() == [8, 8]
    assert candidates.age.tolist() == [4, 4]
    assert candidates.step == 5
    assert candidates.preconditioner.tolist() == [1.0, 1.0]


def test_overdue_blocks_come_first(saved: Saved) -> None:
    saved.a += 1
    save_tensors(saved.running, 3, a=saved.a, b=saved.b)
    saved.a += 100
    saved.b[2] += 1e-3
    assert saved.choose(budget=8).blocks.tolist() != [6]
    assert saved.choose(budget=8, max_age=3).blocks.tolist() == [6]
