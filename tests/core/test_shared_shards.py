"""What is not the same on all ranks: shards of optimizer state, and running statistics."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from core_helpers import Training, assert_same
from ranks import run_ranks
from shared_helpers import Sharded, copied, opened, quietly, whole_state
from torch import nn, optim

from lightning_scar.core.restoration import load


def sharded(rank: int, url: str, steps: int, start: bool, initial: bool = False) -> Any:
    """Trains on; returns what was restored, what the ranks then had, and what all had in the end."""
    training = Sharded()
    found, said, taken = None, "", None
    with opened(url, fraction=0.4) as running:
        if not start:
            checkpoint, said = quietly(running, initial=copied(training) if initial else None)
            found = copy.deepcopy(checkpoint)
            training.load(checkpoint)
            taken = whole_state(training)
        for _ in range(steps):
            training.step()
            training.save(running)
        if steps:
            training.save(running, full=True)
        return found, said, taken, whole_state(training)


@pytest.mark.parametrize(("n", "m"), [(2, 1), (2, 2), (2, 3), (3, 2), (3, 4)])
def test_shards_are_restored_on_any_number_of_ranks(n: int, m: int, tmp_path: Path) -> None:
    url = str(tmp_path / "scar")
    expected = run_ranks(sharded, n, url, 3, True)[0][-1]
    assert len(expected["optimizer_states"][0]["state"]) == 8
    assert_same(load(url), expected)
    results = run_ranks(sharded, m, url, 2, False)
    for found, said, taken, _ in results:
        assert_same(found, expected)
        assert_same(taken, expected)
        assert not said
    assert_same(load(url), results[0][-1])


def test_shards_that_wander_from_rank_to_rank_leave_nothing_stale(tmp_path: Path) -> None:
    url = str(tmp_path / "scar")
    expected = run_ranks(sharded, 3, url, 1, True)[0][-1]
    for m in (2, 4, 2):
        results = run_ranks(sharded, m, url, 1, False)
        assert_same(results[0][0], expected)
        expected = results[0][-1]
        assert_same(load(url), expected)


def test_a_lost_shard_begins_anew_on_as_many_ranks_and_not_on_others(tmp_path: Path) -> None:
    url = str(tmp_path / "scar")
    expected = run_ranks(sharded, 2, url, 3, True)[0][-1]
    shutil.rmtree(tmp_path / "scar" / "rank-0001")
    for m in (1, 3):
        failures = run_ranks(sharded, m, url, 0, False, True, failing=True)
        assert [failure.type for failure in failures] == ["IncompleteError"] * m
        assert all("Resume on 2 ranks" in failure.message for failure in failures)
    failures = run_ranks(sharded, 2, url, 0, False, failing=True)
    assert [failure.type for failure in failures] == ["IncompleteError"] * 2
    (first, said, _, _), (second, _, _, live) = run_ranks(sharded, 2, url, 2, False, True)
    assert "initial values" in said
    assert_same(first, second)
    kept, before = first["optimizer_states"][0]["state"], expected["optimizer_states"][0]["state"]
    assert 0 < len(kept) < len(before)
    for i, values in kept.items():
        assert_same(values, before[i])
    assert_same(load(url), live)
    results = run_ranks(sharded, 3, url, 0, False)
    assert_same(results[0][0], live)


def killed_early(rank: int, url: str, saves: int) -> Any:
    """Resumes; only the first rank saves before all are killed."""
    training = Sharded()
    with opened(url, fraction=0.4) as running:
        training.load(running.restore().checkpoint)
        for _ in range(saves):
            training.step()
            if rank == 0:
                training.save(running)
        return whole_state(training)


@pytest.mark.parametrize(("n", "m", "then"), [(2, 4, 2), (2, 3, 3), (4, 2, 1)])
def test_a_kill_before_all_ranks_have_saved_their_new_shards_loses_none(
    n: int, m: int, then: int, tmp_path: Path
) -> None:
    url = str(tmp_path / "scar")
    run_ranks(sharded, n, url, 3, True)
    live = run_ranks(killed_early, m, url, 2)[0]
    for found, said, _, _ in run_ranks(sharded, then, url, 0, False):
        assert not said
        states = found["optimizer_states"][0]["state"]
        assert list(states) == list(live["optimizer_states"][0]["state"])
        assert all(set(values) == {"step", "exp_avg", "exp_avg_sq"} for values in states.values())


# -- buffers -----------------------------------------------------------------------------------------------------------


def with_statistics(rank: int, url: str, resume: bool) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 40), nn.BatchNorm1d(40))
    training = Training(model, optim.Adam(model.parameters(), lr=0.01))
    with opened(url, fraction=1.0, block_size=64) as running:
        if resume:
            found = running.restore().checkpoint
            training.load(found)
            return copied(training)
        for _ in range(2):
            training.step()
            model[1].running_mean += 1 + rank
            model[1].running_var *= 2 + rank
            training.save(running)
        return copied(training)


def test_running_statistics_are_those_of_the_first_rank(tmp_path: Path) -> None:
    url = str(tmp_path / "scar")
    first, second = run_ranks(with_statistics, 2, url, False)
    assert not torch.equal(first["state_dict"]["1.running_mean"], second["state_dict"]["1.running_mean"])
    assert_same(load(url), first)
    for found in run_ranks(with_statistics, 3, url, True):
        assert_same(found, first)
