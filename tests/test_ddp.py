"""Trainings on several real processes. What happens in them is in ``ddp_runs``."""

import math
import shutil
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import ddp_runs
import loop_runs
import pytest
import torch
from ddp_runs import (
    SMALL,
    Run,
    in_order,
    kill_oneself,
    of_its_own,
    plain,
    shuffled,
    stateful,
    terminate_oneself,
    uneven,
)
from helpers import assert_blocks_as_lived, assert_same, loader, samples
from ranks import Failure, run_ranks
from torch import Tensor

from lightning_scar import load

Call = tuple[tuple[Any, ...], dict[str, Any]]
#: What a run must go on with as it was; callbacks count seconds.
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")


#: The same trainings through each front door.
DOORS: dict[str, Any] = {"Trainer": ddp_runs, "Accelerate": loop_runs}


def call(dirpath: Path, *callbacks: Any, **options: Any) -> Call:
    return (dirpath, *callbacks), options


def trained(world_size: int, *calls: Call, door: str = "Trainer") -> list[list[Any]]:
    """Trainings in the same processes; for every one what each rank saw."""
    by_rank = run_ranks(DOORS[door].train_in_turn, world_size, *calls)
    return [list(runs) for runs in zip(*by_rank, strict=True)]


def train(world_size: int, dirpath: Path, *callbacks: Any, door: str = "Trainer", **options: Any) -> list[Any]:
    (runs,) = trained(world_size, call(dirpath, *callbacks, **options), door=door)
    return runs


def train_and_die(world_size: int, dirpath: Path, *callbacks: Any, **options: Any) -> list[Run | Failure]:
    return run_ranks(ddp_runs.train, world_size, dirpath, *callbacks, failing=True, **options)


def of(checkpoint: dict[str, Any], parts: Sequence[str] = PARTS) -> dict[str, Any]:
    # A loop has batches in the place of an epoch.
    return {part: checkpoint[part] for part in parts if part != "epoch" or "loop" not in checkpoint}


def assert_done(*runs: Run) -> None:
    for rank, run in enumerate(runs):
        assert run.error is None, f"rank {rank}: {run.error}"


def assert_agree(checkpoints: Sequence[dict[str, Any]], parts: Sequence[str] = PARTS) -> None:
    assert all(checkpoints)
    for checkpoint in checkpoints[1:]:
        assert_same(of(checkpoint, parts), of(checkpoints[0], parts))


def assert_resumed(runs: Sequence[Run], parts: Sequence[str] = PARTS) -> None:
    """It went to the end, and all ranks had the same at the start and at the end."""
    assert_done(*runs)
    assert_agree([run.start for run in runs], parts)
    assert_agree([run.final for run in runs], parts)
    assert all(bool(values.isfinite().all()) for values in runs[0].final["state_dict"].values())


def reports(runs: Sequence[Run], word: str = "Recovery:") -> list[str]:
    return [text for text in runs[0].warned if word in text]


def sum_of_samples(epochs: int) -> float:
    return epochs * float(samples(16).tensors[0].sum())


# -- resuming ------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "Adam": {},
    "data in order": {"data": in_order},
    "a plain loader": {"data": plain},
    "a plain loader in the second epoch": {"data": plain, "after": 11},
    "a shuffling loader with a state": {"data": stateful},
    "another order on every rank": {"data": of_its_own, "use_distributed_sampler": False, "max_epochs": 1},
    "a schedule": {"model": "a schedule"},
    "BatchNorm": {"model": "BatchNorm"},
    "unused parameters": {"model": "unused", "ddp": {"find_unused_parameters": True}},
    "a static graph": {"ddp": {"static_graph": True}},
    "accumulated gradients": {"accumulate_grad_batches": 2, "after": 4},
    "two optimizers by hand": {"model": "two optimizers by hand"},
    "raw optimizers": {"model": "raw optimizers"},
    "the end of an epoch": {"after": 8},
    "the second epoch": {"after": 11},
    "ZeRO": {"model": "ZeRO"},
    "ZeRO in the second epoch": {"model": "ZeRO of AdamW", "after": 11},
    "ZeRO of SGD": {"model": "ZeRO of SGD"},
}


#: What is new in these ways, others have, too.
LIKE_OTHERS = ("a plain loader in the second epoch", "ZeRO in the second epoch", "ZeRO of SGD")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] if way in LIKE_OTHERS else []) for way in WAYS]
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(way: str, tmp_path: Path) -> None:
    uncut = {name: value for name, value in WAYS[way].items() if name != "after"}
    cut = call(tmp_path / "cut", **{"after": 5} | WAYS[way])
    wholes, firsts, seconds = trained(2, call(tmp_path / "whole", **uncut), cut, call(tmp_path / "cut", **uncut))
    for whole, first, second in zip(wholes, firsts, seconds, strict=True):
        assert_done(whole, first, second)
        assert first.seen
        assert first.seen + second.seen == whole.seen, "not this rank's own place in the data"
        assert_same(of(second.final), of(whole.final))
    assert seconds[0].seen != seconds[1].seen
    # Not the epoch: Lightning begins the next one, if need be, before it says that training starts.
    last = firsts[0].live[max(firsts[0].live)]
    assert_same(of(seconds[0].start, PARTS[:-1]), of(last, PARTS[:-1]))
    assert_all_agree(seconds, way)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=[pytest.mark.slow] if way == "two workers of a loader" else [])
        for way in loop_runs.WAYS
        if way not in loop_runs.SPECIAL
    ],
)
def test_a_resumed_loop_ends_as_an_uninterrupted_one(way: str, tmp_path: Path) -> None:
    calls = [
        call(tmp_path / "whole", way=way),
        call(tmp_path / "cut", way=way, after=6),
        call(tmp_path / "cut", way=way),
    ]
    wholes, firsts, seconds = trained(2, *calls, door="Accelerate")
    for whole, first, second in zip(wholes, firsts, seconds, strict=True):
        assert_done(whole, first, second)
        assert first.seen + second.seen == whole.seen, "not this rank's own place in the data"
        assert_same(of(second.final), of(whole.final))
    assert seconds[0].seen != seconds[1].seen


def test_ranks_with_uneven_data_save_their_own_way(tmp_path: Path) -> None:
    """One has made a step more than the other when the epoch ends; nobody waits for anybody in a save."""
    whole, cut = call(tmp_path / "whole", way="uneven"), call(tmp_path / "cut", way="uneven", after=8)
    wholes, firsts, seconds = trained(2, whole, cut, call(tmp_path / "cut", way="uneven"), door="Accelerate")
    assert_done(*wholes, *firsts, *seconds)
    assert [len(run.seen) for run in wholes] == [16, 14]
    assert [len(run.seen) for run in firsts] == [8, 8]
    assert_agree([run.start for run in seconds], ("state_dict", "optimizer_states"))
    assert load(tmp_path / "whole")["global_step"] == 16


def assert_all_agree(runs: list[Run], way: str) -> None:
    # Of a sharded optimizer each rank has its own part.
    parts = PARTS if "ZeRO" not in way else ("state_dict", "lr_schedulers", "global_step")
    assert_agree([run.start for run in runs], parts)
    # Between two forward passes running statistics are each rank's own, in DDP as such.
    own = {name for name in runs[0].final["state_dict"] if "running" in name}
    assert bool(own) == (way == "BatchNorm")
    for run in runs:
        for name in own:
            del run.final["state_dict"][name]
    assert_agree([run.final for run in runs], parts)


NUMBERS = [(2, 1, 5), (1, 2, 10), (2, 4, 6), (4, 2, 3), (3, 2, 4)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("door", "before", "now", "after"),
    [
        pytest.param(door, *numbers, marks=[pytest.mark.slow] if door == "Accelerate" and i > 1 else [])
        for door in DOORS
        for i, numbers in enumerate(NUMBERS)
    ],
)
def test_a_run_resumes_on_another_number_of_ranks(tmp_path: Path, before: int, now: int, after: int, door: str) -> None:
    first = train(before, tmp_path, after=after, scar=SMALL, door=door)
    assert_done(*first)
    assert_blocks_as_lived(tmp_path, first[0].live)
    on_disk = load(tmp_path)
    second = train(now, tmp_path, scar=SMALL, door=door)
    assert_resumed(second)
    assert_same(of(second[0].start), of(on_disk))
    assert min(second[0].live) == after + 1
    assert_same(load(tmp_path)["state_dict"], second[0].final["state_dict"])
    # In the epoch that was cut, and in the next one, every sample has its turn once.
    seen = sum(value for run in (*first, *second) for _, value in run.seen)
    assert seen == pytest.approx(sum_of_samples(2), rel=1e-4)
    folders = sorted(path.name for path in tmp_path.glob("rank-*") if any(path.iterdir()))
    assert folders[:now] == [f"rank-{rank:04d}" for rank in range(now)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("before", "now", "after"), [(2, 1, 8), (1, 2, 16), (1, 2, 17)])
@pytest.mark.parametrize("door", DOORS)
def test_an_epochs_end_is_one_on_any_number_of_ranks(
    tmp_path: Path, before: int, now: int, after: int, door: str
) -> None:
    first, second = train(before, tmp_path, after=after, door=door), train(now, tmp_path, door=door)
    assert_resumed(second)
    seen = sum(value for run in (*first, *second) for _, value in run.seen)
    assert seen == pytest.approx(sum_of_samples(2), rel=1e-4)
    assert len(second[0].seen) == 16 // now


@pytest.mark.sampled(3)
@pytest.mark.parametrize("data", [plain, uneven, in_order, shuffled])
@pytest.mark.parametrize("ranks", [(2, 1, 2), (1, 2, 3)])
def test_an_epoch_is_shared_out_again_and_again(ranks: tuple[int, ...], data: Any, tmp_path: Path) -> None:
    """By one number of ranks after another, of which only the last does not crash."""
    options: dict[str, Any] = {"model": "by sample", "data": data, "max_epochs": 1}
    runs = [
        train(number, tmp_path, after=after, **options)
        for number, after in zip(ranks, (3, 3 + 3 * ranks[0] // ranks[1] + 1, None), strict=True)
    ]
    seen = [value for of_all_ranks in runs for run in of_all_ranks for _, value in run.seen]
    whole = [float(x.sum()) for x, _ in samples(16)][: 63 if data is uneven else 64]
    assert set(seen) == set(whole)
    assert len(seen) - len(whole) < 3, "a few are repeated, so that each rank has as many"


def test_a_rest_that_was_shared_out_goes_on_where_it_was(tmp_path: Path) -> None:
    """Also what is repeated at its end, so that each rank has as many."""
    options: dict[str, Any] = {"model": "by sample", "data": uneven, "max_epochs": 2}
    train(1, tmp_path / "cut", after=3, **options)
    shutil.copytree(tmp_path / "cut", tmp_path / "whole")
    wholes = train(2, tmp_path / "whole", **options)
    firsts = train(2, tmp_path / "cut", after=3 + 3, **options)
    seconds = train(2, tmp_path / "cut", **options)
    for whole, first, second in zip(wholes, firsts, seconds, strict=True):
        assert first.seen
        assert second.seen
        assert first.seen + second.seen == whole.seen


def test_loaders_without_a_state_resume_on_another_number_of_ranks(tmp_path: Path) -> None:
    plain = {"data": loader}
    train(1, tmp_path, after=6, **plain)
    second = train(2, tmp_path, **plain)
    assert_resumed(second)
    assert second[0].final["global_step"] == 6 + 1 + 4


def test_a_finished_run_is_loaded_and_goes_on_to_higher_limits(tmp_path: Path) -> None:
    replaced = call(tmp_path, max_epochs=1, scar={"resume": False})
    first, again, more, anew = trained(2, call(tmp_path), call(tmp_path), call(tmp_path, max_epochs=3), replaced)
    assert_done(*again)
    for run, before in zip(again, first, strict=True):
        assert run.seen == []
        assert_same(dict(run.weights), dict(before.final["state_dict"]))
    assert_resumed(more)
    assert_same(of(more[0].start), of(first[0].final))
    assert list(more[0].live) == list(range(17, 25))
    assert_done(*anew)
    assert list(anew[0].live) == list(range(1, 9))
    assert_same(load(tmp_path)["state_dict"], anew[1].final["state_dict"])


def test_all_ranks_test_what_is_in_the_directory(tmp_path: Path) -> None:
    runs = train(2, tmp_path / "scar", test=str(tmp_path / "scar"), scar=SMALL)
    assert_done(*runs)
    for run in runs:
        (metrics,), weights = run.tested
        assert math.isfinite(metrics["test_loss"])
        assert_same(dict(weights), dict(runs[0].final["state_dict"]))


# -- what is saved -------------------------------------------------------------------------------------------------


def test_every_rank_holds_its_share_of_the_bytes(tmp_path: Path) -> None:
    runs = train(4, tmp_path, model="wide", after=1, scar={"block_size": 256})
    assert_done(*runs)
    sizes = [sum(file.stat().st_size for file in (tmp_path / f"rank-{rank:04d}").iterdir()) for rank in range(4)]
    tensors = runs[0].live[1]["state_dict"].values()
    state = 3 * sum(tensor.nbytes for tensor in tensors)
    assert sum(sizes) > state
    assert max(sizes) < 1.5 * min(sizes), sizes


def test_every_save_logs_what_a_crash_would_cost(tmp_path: Path) -> None:
    scar = {"fraction": 0.2, "block_size": 256, "full_every_n_saves": None}
    runs = train(2, tmp_path, ddp_runs.Patient(), model="wide", scar=scar)
    assert_done(*runs)
    for run in runs:
        # The two at the last step are logged as one.
        assert [row["scar/saves"] for row in run.logged] == [*range(1, 16), 17]
        for row in run.logged:
            assert math.isfinite(row["scar/rework_cost"])
            assert math.isfinite(row["scar/distance"])
        assert max(row["scar/rework_cost"] for row in run.logged) > 0
    # Each rank knows its own half of now and the other's of a moment ago, so that both say about the same.
    first, second = ([row["scar/distance"] for row in run.logged[3:-2]] for run in runs)
    assert mean(first) == pytest.approx(mean(second), rel=0.3)


def test_the_distance_of_two_ranks_is_that_of_the_whole_state(tmp_path: Path) -> None:
    scar = {"fraction": 0.2, "block_size": 256, "full_every_n_saves": None}
    runs = train(2, tmp_path, ddp_runs.Patient(), model="wide", after=9, scar=scar)
    on_disk, live = load(tmp_path)["state_dict"], runs[0].live[max(run.stats["step"] for run in runs)]["state_dict"]
    apart = math.sqrt(sum(float((on_disk[name] - live[name]).square().sum()) for name in live))
    assert apart > 0
    for run in runs:
        assert run.stats["distance"] == pytest.approx(apart, rel=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = train(2, tmp_path, model="wide", scar=scar)
    assert_resumed(second)


# -- trouble -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("killed", [(0, 1), (0,), (1,)])
def test_killed_ranks_cost_a_step_or_two(tmp_path: Path, killed: tuple[int, ...]) -> None:
    first = train_and_die(2, tmp_path, ddp_runs.Patient(), kill_oneself(*killed), scar=SMALL)
    for rank, run in enumerate(first):
        if rank in killed:
            assert isinstance(run, Failure)
            assert f"ended with {-signal.SIGKILL}" in run.message
        else:
            assert isinstance(run, Run)
            assert run.error is not None
    second = train(2, tmp_path, scar=SMALL)
    assert_resumed(second)
    assert 4 <= second[0].start["global_step"] <= 5
    assert second[0].final["global_step"] == 16


def test_a_rank_killed_among_four(tmp_path: Path) -> None:
    first = train_and_die(4, tmp_path, ddp_runs.Patient(), kill_oneself(2, batch=2), scar=SMALL)
    assert isinstance(first[2], Failure)
    second = train(4, tmp_path, scar=SMALL)
    assert_resumed(second)
    assert second[0].start["global_step"] >= 1


def deltas(dirpath: Path, rank: int) -> list[Path]:
    return sorted((dirpath / f"rank-{rank:04d}").iterdir(), key=lambda path: path.name.split("-", 1)[1])


def lose_the_folder(dirpath: Path) -> None:
    for path in deltas(dirpath, 1):
        path.unlink()
    (dirpath / "rank-0001").rmdir()


def truncate_a_delta(dirpath: Path) -> None:
    path = deltas(dirpath, 1)[-1]
    path.write_bytes(path.read_bytes()[:-100])


def spoil_a_block(dirpath: Path) -> None:
    content = bytearray(deltas(dirpath, 0)[-1].read_bytes())
    content[-5] ^= 0xFF
    deltas(dirpath, 0)[-1].write_bytes(content)


LOSSES = {
    "a folder": (lose_the_folder, "initial values"),
    "the end of a delta": (truncate_a_delta, "damaged"),
    "a bit": (spoil_a_block, "older version"),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("loss", "world_size"), [("a folder", 2), ("a folder", 3), ("the end of a delta", 2), ("a bit", 3)]
)
@pytest.mark.parametrize("door", DOORS)
def test_what_is_lost_is_lost_alone(tmp_path: Path, loss: str, world_size: int, door: str) -> None:
    lose, word = LOSSES[loss]
    first = train(2, tmp_path, after=6, scar=SMALL | {"full_every_n_saves": 3}, door=door)
    lose(tmp_path)
    second = train(world_size, tmp_path, scar=SMALL, door=door)
    assert_resumed(second)
    (report,) = reports(second)
    assert word in report
    assert second[0].start["global_step"] == 6
    lived = [first[0].live[step]["state_dict"] for step in first[0].live]
    same = [
        any(torch.equal(row, then[name][i]) for then in lived)
        for name, tensor in second[0].start["state_dict"].items()
        for i, row in enumerate(tensor)
    ]
    assert sum(same) > len(same) / 3, "what was not lost is gone, too"


def test_a_rank_that_saved_less_than_the_others(tmp_path: Path) -> None:
    train(2, tmp_path, after=6, scar={"full_every_n_saves": 3, "fraction": 0.3, "block_size": 64})
    newest = deltas(tmp_path, 1)[-1]
    newest.unlink()
    second = train(2, tmp_path, scar=SMALL)
    assert_resumed(second)
    assert second[0].start["global_step"] == 6


def test_a_rank_that_cannot_write_does_not_disturb_the_others(tmp_path: Path) -> None:
    (first,) = trained(2, call(tmp_path, ddp_runs.Unwritable(3, rank=1), scar=SMALL, after=7))
    assert_done(*first)
    assert first[0].stats["failed_saves"] == 0
    assert first[1].stats["failed_saves"] > 2
    assert any("No space left" in text for text in first[1].warned)
    on_disk = load(tmp_path)
    assert on_disk["global_step"] == 7
    second = train(2, tmp_path, scar=SMALL)
    assert_resumed(second)
    assert_same(of(second[0].start), of(on_disk))


def test_a_rank_that_never_could_write_does_not_disturb_the_others(tmp_path: Path) -> None:
    tmp_path.joinpath("scar").mkdir()
    tmp_path.joinpath("scar", "rank-0001").touch()
    runs = train(2, tmp_path / "scar", scar=SMALL)
    assert_done(*runs)
    assert_agree([run.final for run in runs])
    assert runs[0].stats["failed_saves"] == 0
    assert runs[1].stats["failed_saves"] == runs[1].stats["saves"] > 0


def test_a_slow_rank_does_not_hold_up_the_others(tmp_path: Path) -> None:
    runs = train(2, tmp_path, ddp_runs.Slow(rank=1), scar=SMALL | {"full_every_n_saves": None}, after=12)
    assert_done(*runs)
    assert runs[1].stats["skipped_saves"] > runs[0].stats["skipped_saves"]
    assert_blocks_as_lived(tmp_path, runs[0].live)
    assert_resumed(train(2, tmp_path, scar=SMALL))


def test_ranks_with_different_models_are_told_the_first_difference(tmp_path: Path) -> None:
    runs = train(3, tmp_path, model="another on every rank")
    for run in runs:
        assert run.error is not None
        assert run.error[0] == "ModelMismatchError"
        assert "net.0.weight is (32, 8) float32 on rank 0 and (33, 8) float32 on rank 1" in run.error[1]
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "lease.json").exists()


def test_ranks_with_different_directories_are_told_so(tmp_path: Path) -> None:
    for run in run_ranks(ddp_runs.train_in_folders_of_their_own, 3, tmp_path):
        assert run.error is not None
        assert run.error[0] == "StorageError"
        assert "not the same directory on all ranks" in run.error[1]
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("door", DOORS)
def test_options_of_memory_without_memory_are_told_once(tmp_path: Path, door: str) -> None:
    first, second = train(2, tmp_path, scar={"replicas": 2, "memory_limit": 4096}, after=3, door=door)
    assert [text for text in first.warned if "memory" in text] == [
        "lightning-scar: without memory=True, these have no effect: replicas=2, memory_limit=4096; "
        "add it, or leave them out"
    ]
    assert not [text for text in second.warned if "memory" in text]


@pytest.mark.parametrize("told", [(0, 1, 2), (0,)])
def test_ranks_that_are_told_to_stop_save_and_end(tmp_path: Path, told: tuple[int, ...]) -> None:
    seldom = {"every_n_train_steps": 100, "save_on_exception": True, "full_every_n_saves": None}
    first = train_and_die(3, tmp_path, terminate_oneself(*told, batch=3), scar=seldom)
    for run in first:
        assert isinstance(run, Run)
        assert run.error is not None, "went on although told to stop"
    step = load(tmp_path)["global_step"]
    assert step == 4
    assert_same(load(tmp_path)["state_dict"], first[0].live[step]["state_dict"])  # type: ignore[union-attr]
    second = train(3, tmp_path)
    assert_resumed(second)
    assert min(second[0].live) == step + 1


# -- ZeRO ----------------------------------------------------------------------------------------------------------


def moments(checkpoint: dict[str, Any]) -> dict[int, dict[str, Tensor]]:
    return checkpoint["optimizer_states"][0]["state"]  # type: ignore[no-any-return]


def all_moments(runs: Sequence[Run], when: str = "start") -> dict[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for run in runs:
        own = moments(getattr(run, when))
        assert not found.keys() & own.keys(), "two ranks have the same"
        found |= own
    return dict(sorted(found.items()))


@pytest.mark.parametrize(("before", "now"), [(2, 1), (1, 2), (2, 3), (3, 2)])
def test_zero_is_sharded_anew_on_another_number_of_ranks(tmp_path: Path, before: int, now: int) -> None:
    first = train(before, tmp_path, after=4, model="ZeRO", scar=SMALL)
    assert_done(*first)
    on_disk = load(tmp_path)
    assert sorted(moments(on_disk)) == [0, 1, 2, 3]
    second = train(now, tmp_path, model="ZeRO", scar=SMALL)
    assert_resumed(second, ("state_dict", "global_step"))
    assert_same(all_moments(second), moments(on_disk))
    assert second[0].start["global_step"] == 4


def test_zero_goes_on_without_sharding_and_back(tmp_path: Path) -> None:
    first = train(2, tmp_path, after=4, model="ZeRO")
    second = train(2, tmp_path, after=6, model="ZeRO without sharding")
    assert_done(*second)
    assert_agree([run.start for run in second])
    assert_same(moments(second[0].start), all_moments([Run(start=run.live[4]) for run in first]))
    third = train(2, tmp_path, model="ZeRO")
    assert_resumed(third, ("state_dict", "global_step"))
    assert_same(all_moments(third), moments(second[0].live[6]))


def test_zero_in_a_loop(tmp_path: Path) -> None:
    whole = run_ranks(loop_runs.train_zero, 2, tmp_path / "whole")
    run_ranks(loop_runs.train_zero, 2, tmp_path / "cut", after=5)
    on_one = shutil.copytree(tmp_path / "cut", tmp_path / "on one")
    resumed = run_ranks(loop_runs.train_zero, 2, tmp_path / "cut")
    for now, then in zip(resumed, whole, strict=True):
        assert_same(now, then)
        assert now["optimizer_states"][0]["state"]
    run_ranks(loop_runs.train_zero, 1, on_one)
    assert sorted(moments(load(on_one))) == [0, 1, 2, 3]


def test_the_saves_of_zero_wait_for_no_other_rank(tmp_path: Path) -> None:
    alone = [ddp_runs.OneRankAloneDumps(), ddp_runs.Slow(rank=0)]
    runs = train(2, tmp_path, *alone, model="ZeRO", after=7, scar=SMALL | {"full_every_n_saves": None})
    assert_done(*runs)
    assert sum(run.stats["skipped_saves"] for run in runs) > 0
    second = train(2, tmp_path, model="ZeRO")
    assert_resumed(second, ("state_dict", "global_step"))


def test_a_lost_shard_of_zero_begins_anew(tmp_path: Path) -> None:
    first = train(2, tmp_path, after=5, model="ZeRO")
    lose_the_folder(tmp_path)
    calls = trained(3, call(tmp_path, model="ZeRO"))[0]
    for run in calls:
        assert run.error is not None
        assert run.error[0] == "IncompleteError"
        assert "sharded over 2 ranks" in run.error[1]
    second = train(2, tmp_path, model="ZeRO")
    assert_resumed(second, ("state_dict", "global_step"))
    assert "initial values" in reports(second)[0]
    assert_same(moments(second[0].start), moments(first[0].live[5]))
    assert moments(second[1].start) == {}
    assert moments(first[1].live[5])
    third = train(3, tmp_path, model="ZeRO", ckpt_path=str(tmp_path), max_epochs=3)
    assert_resumed(third, ("state_dict", "global_step"))
    assert sorted(all_moments(third)) == [0, 1, 2, 3], "the next save was not of the whole state"
