"""Blocks of a live run that turned NaN, on real ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from core_helpers import Training, assert_same, drain
from ranks import run_ranks
from shared_helpers import Sharded, copied, make_training, opened, whole_state
from torch import nn, optim

from lightning_scar.core.ranks import Ranks
from lightning_scar.core.recovery import Source
from lightning_scar.core.restoration import load
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.zero import shard_state


def heal(training: Training, running: RunningCheckpoint) -> Any:
    return running.heal(training.checkpoint(), **training._options())


def sources(plan: Any) -> dict[Source, set[str]]:
    found: dict[Source, set[str]] = {}
    for key in plan:
        found.setdefault(plan[key].source, set()).add(key)
    return found


def moments(training: Training, i: int) -> dict[str, torch.Tensor]:
    return training.optimizers[0].state_dict()["state"][i]


def healed(rank: int, url: str, where: list[int], resume: bool, moment: bool) -> Any:
    """NaN in rows 2 to 4 of the first weight, or of its moments, on some ranks."""
    training, ranks = make_training(), Ranks.of_default_group()
    with opened(url, fraction=1.0, block_size=192) as running:
        if resume:
            training.load(running.restore().checkpoint)
        training.step()
        training.save(running)
        saved = copied(training)
        training.step()
        before, rng = copied(training), torch.get_rng_state()
        nothing = heal(training, running)
        assert_same(copied(training), before)
        with torch.no_grad():
            if rank in where:
                (moments(training, 0)["exp_avg"] if moment else training.model[0].weight)[2:4] = torch.nan
        # One still saves while the others have begun to heal.
        if rank == ranks.world_size - 1:
            training.begin(running)
        plan = heal(training, running)
        after = copied(training)
        assert torch.equal(rng, torch.get_rng_state())
        training.step()
        training.save(running, full=True)
        drain(running)
        return nothing, sources(plan), str(plan), saved, before, after, copied(training)


@pytest.mark.parametrize("moment", [False, True])
@pytest.mark.parametrize(("where", "resume"), [([0, 1], False), ([0, 1], True), ([0], False), ([1], False)])
def test_what_turned_nan_comes_from_a_survivor_or_from_disk(
    where: list[int], resume: bool, moment: bool, tmp_path: Path
) -> None:
    url = str(tmp_path / "scar")
    if resume:
        run_ranks(healed, 3, url, [0, 1, 2], False, False)
    results = run_ranks(healed, 2, url, where, resume, moment)
    for nothing, found, said, saved, before, after, end in results:
        assert nothing is None
        assert_same(after, results[0][5])
        lost = {"state_dict/0.weight[2:4]"}
        assert found.get(Source.NEWEST, set()) == (lost if len(where) == 2 else set())
        assert "from survivors" in said
        expected = before
        if len(where) == 2:
            expected["state_dict"]["0.weight"][2:4] = saved["state_dict"]["0.weight"][2:4]
            for slot in ("exp_avg", "exp_avg_sq"):
                then = saved["optimizer_states"][0]["state"][0][slot]
                expected["optimizer_states"][0]["state"][0][slot][2:4] = then[2:4]
        assert_same(after, expected)
        assert_same(end, results[0][6])
    assert_same(load(url), results[0][6])


def healed_statistics(rank: int, url: str, where: int) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 40), nn.BatchNorm1d(40))
    training = Training(model, optim.SGD(model.parameters(), lr=0.01))
    with opened(url, block_size=64) as running:
        training.step()
        model[1].running_mean += 1 + rank
        training.save(running)
        model[1].running_mean += 1
        if rank == where:
            model[1].running_mean[3] = torch.nan
        return sources(heal(training, running)), copied(training)["state_dict"]["1.running_mean"]


def test_running_statistics_are_healed_from_the_first_rank_only(tmp_path: Path) -> None:
    first, second = run_ranks(healed_statistics, 2, str(tmp_path / "a"), 1)
    assert Source.NEWEST not in first[0]
    # Rows of one block of 16 come from the first rank, as all of them do in a recovery.
    assert first[1].tolist() == [2.0] * 40
    assert second[1].tolist() == [2.0] * 16 + [3.0] * 24
    first, second = run_ranks(healed_statistics, 2, str(tmp_path / "b"), 0)
    assert first[0][Source.NEWEST] == {"state_dict/1.running_mean[0:16]"}
    assert first[1].tolist() == [1.0] * 16 + [2.0] * 24
    assert second[1].tolist() == [1.0] * 16 + [3.0] * 24


def healed_shard(rank: int, url: str, where: str) -> Any:
    training = Sharded()
    with opened(url, fraction=1.0, block_size=160) as running:
        training.step()
        training.save(running)
        saved = whole_state(training)
        training.step()
        before = whole_state(training)
        state = shard_state(training.optimizers[0])["state"]
        i = 2
        with torch.no_grad():
            if where == "moment" and i in state:
                state[i]["exp_avg"][1] = torch.nan
            if where == "parameter of the owner" and i in state:
                training.model[1].weight[1] = torch.nan
            if where == "parameter of the others" and i not in state:
                training.model[1].weight[1] = torch.nan
        plan = heal(training, running)
        after = whole_state(training)
        training.step()
        training.save(running, full=True)
        return sources(plan), saved, before, after, whole_state(training), copied(training)["state_dict"]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("where", ["moment", "parameter of the owner", "parameter of the others"])
def test_what_turned_nan_in_a_shard_comes_from_its_owner_or_from_disk(where: str, n: int, tmp_path: Path) -> None:
    url = str(tmp_path / "scar")
    results = run_ranks(healed_shard, n, url, where)
    found, saved, expected, after, end, _ = results[0]
    if where == "parameter of the others":
        assert Source.NEWEST not in found
    else:
        assert found[Source.NEWEST] == {"state_dict/1.weight[0:2]"}
        expected["state_dict"]["1.weight"][0:2] = saved["state_dict"]["1.weight"][0:2]
        for slot in ("exp_avg", "exp_avg_sq"):
            then = saved["optimizer_states"][0]["state"][2][slot]
            expected["optimizer_states"][0]["state"][2][slot][0:2] = then[0:2]
    assert_same(after, expected)
    for other in results[1:]:
        assert_same(other[-1], results[0][-1])
    assert_same(load(url), end)


def nothing_to_heal_with(rank: int, url: str) -> None:
    training = make_training()
    with opened(url) as running:
        with torch.no_grad():
            training.model[0].weight[0] = torch.nan
        heal(training, running)


def test_what_is_neither_alive_nor_on_disk_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    failures = run_ranks(nothing_to_heal_with, 2, str(tmp_path / "scar"), failing=True)
    assert [failure.type for failure in failures] == ["IncompleteError"] * 2


def with_a_blind_rank(rank: int, url: str) -> None:
    training = make_training()
    with opened(url, block_size=192) as running:
        if rank == 1:
            running.store.look_around = lambda others=False: None  # type: ignore[method-assign]
        training.save(running)
        with torch.no_grad():
            training.model[0].weight[0] = torch.nan
        heal(training, running)


def test_a_rank_that_sees_less_than_the_others_leaves_none_of_them_waiting(tmp_path: Path) -> None:
    failures = run_ranks(with_a_blind_rank, 2, str(tmp_path / "scar"), failing=True)
    assert [failure.type for failure in failures] == ["IncompleteError"] * 2
