"""The shards of a ZeroRedundancyOptimizer, on real ranks."""

import pickle
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same
from ranks import RankError, run_ranks
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import SGD, Adam, Optimizer

from lightning_scar.core import zero

STEPS = 4


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(3, 3))
    model[1].bias.requires_grad = False  # never gets a state
    return model


def groups(model: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": list(model[:2].parameters())}, {"params": list(model[2].parameters()), "lr": 0.02}]


def sharded(model: nn.Sequential, **options: Any) -> ZeroRedundancyOptimizer:
    return ZeroRedundancyOptimizer(groups(model), **{"optimizer_class": Adam, "lr": 0.01, **options})


def train(model: nn.Sequential, optimizer: Optimizer, first: int = 0, steps: int = STEPS) -> None:
    """Every rank sees the same batches, so their gradients are those of a single process, bit for bit."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.zero_grad()
        model(torch.randn(4, 8, generator=generator)).square().mean().backward()
        optimizer.step()


def trained(**options: Any) -> tuple[nn.Sequential, ZeroRedundancyOptimizer]:
    model = make_model()
    optimizer = sharded(model, **options)
    train(model, optimizer)
    return model, optimizer


def union(shards: list[dict[str, Any]]) -> dict[str, Any]:
    assert all(shard["param_groups"] == shards[0]["param_groups"] for shard in shards)
    merged = {i: values for shard in shards for i, values in shard["state"].items()}
    assert len(merged) == sum(len(shard["state"]) for shard in shards), "two ranks claim the same state"
    return {"state": dict(sorted(merged.items())), "param_groups": shards[0]["param_groups"]}


# -- the whole -----------------------------------------------------------------------------------------------------


def shard_and_whole(rank: int, added: bool, reloaded: bool, options: dict[str, Any]) -> tuple[Any, Any]:
    model, optimizer = trained(**options)
    if added:
        optimizer.add_param_group({"params": list(model[3].parameters()), "lr": 0.05})
        train(model, optimizer)
    if reloaded:
        whole = [consolidated(optimizer)]
        dist.broadcast_object_list(whole)
        optimizer.load_state_dict(whole[0])
        train(model, optimizer)
    return zero.shard_state(optimizer), consolidated(optimizer)


def consolidated(optimizer: ZeroRedundancyOptimizer) -> Any:
    optimizer.consolidate_state_dict()
    return optimizer.state_dict() if dist.get_rank() == 0 else None


@pytest.mark.parametrize(
    ("n", "added", "reloaded", "options"),
    [
        pytest.param(2, False, False, {}, id="two ranks"),
        pytest.param(3, True, False, {}, id="three ranks and a group added late"),
        pytest.param(2, True, True, {"parameters_as_bucket_view": True}, id="buckets, and after a load"),
        pytest.param(3, False, True, {"optimizer_class": SGD, "momentum": 0.9}, id="SGD after a load"),
        pytest.param(2, False, False, {"optimizer_class": SGD}, id="no state at all"),
    ],
)
def test_the_shards_of_all_ranks_are_the_consolidated_state(
    n: int, added: bool, reloaded: bool, options: dict[str, Any]
) -> None:
    results = run_ranks(shard_and_whole, n, added, reloaded, options)
    whole = union([shard for shard, _ in results])
    assert_same(whole, results[0][1])
    assert list(whole["state"]) == list(results[0][1]["state"])
    assert all(shard["state"] for shard, _ in results) or options == {"optimizer_class": SGD}


def more_ranks_than_parameters(rank: int) -> Any:
    weight = nn.Parameter(torch.ones(3))
    optimizer = ZeroRedundancyOptimizer([weight], Adam, lr=0.01)
    weight.sum().backward()
    optimizer.step()
    return zero.shard_state(optimizer)


def test_a_rank_without_parameters_has_an_empty_shard() -> None:
    first, second = run_ranks(more_ranks_than_parameters, 2)
    assert list(first["state"]) == [0]
    assert second == {"state": {}, "param_groups": first["param_groups"]}


# -- live, and alone -----------------------------------------------------------------------------------------------


def look_at_storage(rank: int) -> tuple[bool, bool]:
    model, optimizer = trained()
    shard = zero.shard_state(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    same = all(
        values[word].data_ptr() == optimizer.optim.state[parameters[i]][word].data_ptr()
        for i, values in shard["state"].items()
        for word in ("step", "exp_avg", "exp_avg_sq")
    )
    before = pickle.dumps(shard["state"])
    train(model, optimizer, STEPS, 1)
    return same, pickle.dumps(shard["state"]) != before


def test_the_references_are_live() -> None:
    assert run_ranks(look_at_storage, 2) == [(True, True)] * 2


def only_one_asks(rank: int) -> Any:
    _, optimizer = trained()
    if rank == 1:
        zero.shard_state(optimizer)
        zero.shard_owner(optimizer)
    total = torch.ones(1)
    dist.all_reduce(total)
    before = pickle.dumps(zero.shard_state(optimizer))
    dist.destroy_process_group()
    zero.shard_owner(optimizer)
    return float(total), pickle.dumps(zero.shard_state(optimizer)) == before


def test_one_rank_may_ask_alone_and_even_without_a_group() -> None:
    assert run_ranks(only_one_asks, 2) == [(2.0, True)] * 2


# -- back again ----------------------------------------------------------------------------------------------------


def first_half(rank: int, options: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model, optimizer = trained(**options)
    return model.state_dict(), zero.shard_state(optimizer)


def second_half(
    rank: int, weights: dict[str, Tensor], state: dict[str, Any], options: dict[str, Any]
) -> dict[str, Tensor]:
    model = make_model()
    model.load_state_dict(weights)
    optimizer = sharded(model, **options)
    optimizer.load_state_dict(state)
    train(model, optimizer, STEPS)
    return model.state_dict()


def uninterrupted(rank: int) -> dict[str, Tensor]:
    model = make_model()
    train(model, Adam(groups(model), lr=0.01), steps=2 * STEPS)
    return model.state_dict()


@pytest.mark.parametrize("options", [{}, {"parameters_as_bucket_view": True}], ids=["plain", "buckets"])
def test_three_ranks_go_on_as_two_and_as_plain_adam_would(options: dict[str, Any]) -> None:
    """Exactly: on a CPU Adam treats each parameter by itself, so it does not matter who else is in the shard."""
    halves = run_ranks(first_half, 3, options)
    weights, state = halves[0][0], union([shard for _, shard in halves])
    (plain,) = run_ranks(uninterrupted, 1)
    for resumed in run_ranks(second_half, 2, weights, state, options):
        assert_same(resumed, plain)


def load_with_a_hole(rank: int, hole: int) -> tuple[list[int], list[int], list[int], list[float]]:
    model, optimizer = trained()
    whole = [consolidated(optimizer)]
    dist.broadcast_object_list(whole)
    del whole[0]["state"][hole]
    fresh = sharded(model)
    kept = dict(whole[0]["state"])
    fresh.load_state_dict(whole[0])
    emptied = [i for i, values in whole[0]["state"].items() if values is None]
    loaded = list(zero.shard_state(fresh)["state"])
    train(model, fresh, STEPS, 1)
    counts = [float(values["step"]) for values in zero.shard_state(fresh)["state"].values()]
    foreign = [i for i in kept if i not in loaded]
    assert emptied == foreign, "load_state_dict no longer replaces the states of other ranks by None in the dict"
    return loaded, emptied, list(zero.shard_state(fresh)["state"]), counts


def test_a_parameter_without_a_saved_state_starts_anew() -> None:
    results = run_ranks(load_with_a_hole, 2, 2)
    assert sorted(i for loaded, *_ in results for i in loaded) == [0, 1, 4, 5]
    assert sorted(i for _, _, later, _ in results for i in later) == [0, 1, 2, 4, 5]
    assert sorted(count for *_, counts in results for count in counts) == [1, *[STEPS + 1] * 4]


# -- who has what --------------------------------------------------------------------------------------------------


def owners_and_shard(rank: int) -> tuple[dict[int, int], list[int]]:
    _, optimizer = trained()
    owners = zero.shard_owner(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(owners) == len(parameters)
    return {i: owners[parameter] for i, parameter in enumerate(parameters)}, list(zero.shard_state(optimizer)["state"])


def test_owners() -> None:
    """``_owners``: if it fails after an upgrade of torch, the partition lies elsewhere."""
    results = run_ranks(owners_and_shard, 3)
    assert all(owners == results[0][0] for owners, _ in results), "the ranks disagree"
    for rank, (owners, shard) in enumerate(results):
        assert set(shard) == {i for i, owner in owners.items() if owner == rank and i != 3}


def look_at_local_optimizer(rank: int) -> tuple[bool, int]:
    _, optimizer = trained()
    local = zero._local_optimizer(optimizer)
    return type(local) is Adam, sum(len(group["params"]) for group in local.param_groups)


def test_local_optimizer() -> None:
    """``_local_optimizer``: if it fails after an upgrade of torch, the states lie elsewhere."""
    kinds, counts = zip(*run_ranks(look_at_local_optimizer, 2), strict=True)
    assert all(kinds)
    assert sum(counts) == 6


def overlapping(rank: int, function: str) -> None:
    getattr(zero, function)(ZeroRedundancyOptimizer(make_model().parameters(), Adam, overlap_with_ddp=True))


@pytest.mark.parametrize("function", ["shard_state", "shard_owner"])
def test_an_optimizer_that_overlaps_with_ddp_is_refused(function: str) -> None:
    failures = run_ranks(overlapping, 2, function, failing=True)
    assert [failure.type for failure in failures] == ["ValueError"] * 2
    assert "overlap_with_ddp=False" in failures[0].message


def is_sharded_here(rank: int) -> bool:
    return zero.is_sharded(sharded(make_model()))


def test_is_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_ranks(is_sharded_here, 1) == [True]
    plain = SGD(make_model().parameters())
    assert not zero.is_sharded(plain)
    monkeypatch.delitem(sys.modules, "torch.distributed.optim")
    assert not zero.is_sharded(plain)


# -- the helper itself ---------------------------------------------------------------------------------------------


def one_fails(rank: int) -> int:
    if rank == 1:
        raise KeyError("lost")
    dist.barrier()
    return rank


def test_a_rank_that_fails_is_named() -> None:
    with pytest.raises(RankError, match=r"(?s)\Arank 1: Traceback.*KeyError: 'lost'"):
        run_ranks(one_fails, 2)
