"""Reading a running checkpoint back."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from core_helpers import Training, assert_same, save_tensors, saved_steps
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from lightning_scar.core.blocks import BlockMap, Group, Slot
from lightning_scar.core.restoration import (
    NoCheckpointError,
    is_running_checkpoint,
    load,
    restore,
)
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings
from lightning_scar.core.skeletons import describe, parse
from lightning_scar.storage.store import DeltaStore


def opened(url: str | Path, **settings: Any) -> RunningCheckpoint:
    return RunningCheckpoint(url, Settings(**{"fraction": 0.3, "block_size": 16, **settings}))


def trained(url: str | Path, full_at: int = 3, steps: int = 6) -> tuple[Training, dict[int, dict[str, Any]]]:
    """A run of partial saves with one more full save in the middle, and what its state was at every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    training = Training(model, optim.Adam(model.parameters()))
    history = {}
    with opened(url) as running:
        for _ in range(steps):
            training.step()
            history[training.steps] = copy.deepcopy(training.checkpoint())
            training.save(running, full=training.steps == full_at)
    return training, history


# -- consistent reading ----------------------------------------------------------------------------------------------


def test_a_consistent_state_is_that_of_the_newest_full_save_bit_for_bit(memory_url: str) -> None:
    _, history = trained(memory_url)
    assert_same(load(memory_url, consistent=True), history[3])


def test_without_consistent_the_blocks_are_of_different_steps(memory_url: str) -> None:
    trained(memory_url)
    assert load(memory_url)["global_step"] == 6
    assert len(set(saved_steps(memory_url).values())) > 1


def test_the_first_save_is_a_consistent_state_until_there_is_another(memory_url: str) -> None:
    _, history = trained(memory_url, full_at=0)
    assert_same(load(memory_url, consistent=True), history[1])


def test_a_resumed_run_keeps_the_consistent_state_until_its_own_full_save(memory_url: str) -> None:
    training, history = trained(memory_url)
    with opened(memory_url) as running:
        training.load(running.restore().checkpoint)
        for _ in range(4):
            training.step()
            training.save(running)
        assert_same(load(memory_url, consistent=True), history[3])
        training.save(running, full=True)
    assert_same(load(memory_url, consistent=True), training.checkpoint())


def test_an_empty_directory_has_no_checkpoint_consistent_or_not(tmp_path: Path) -> None:
    for consistent in (False, True):
        with pytest.raises(NoCheckpointError, match=f"{tmp_path} holds no running checkpoint"):
            load(tmp_path, consistent=consistent)


# -- the loaded dict -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["file", "memory"])
def test_paths_and_urls_hold_the_same(where: str, tmp_path: Path, memory_url: str) -> None:
    url = tmp_path / "a" / "b" if where == "file" else memory_url
    training, _ = trained(url)
    with opened(url) as running:
        training.load(running.restore().checkpoint)
        training.save(running, full=True)
    assert_same(load(url), training.checkpoint())


def test_loading_does_not_need_or_touch_the_lock_of_a_live_run(tmp_path: Path) -> None:
    with opened(tmp_path) as running:
        save_tensors(running, 1, x=torch.ones(3))
        before = (tmp_path / "lease.json").read_bytes()
        load(tmp_path)
        assert (tmp_path / "lease.json").read_bytes() == before


@pytest.mark.parametrize(
    "map_location",
    ["meta", torch.device("meta"), {"cpu": "meta"}, lambda tensor, where: tensor.to("meta")],
    ids=["name", "device", "mapping", "function"],
)
def test_tensors_are_moved_where_the_caller_wants_them(map_location: Any, memory_url: str) -> None:
    with opened(memory_url) as running:
        save_tensors(running, 1, x=torch.ones(3))
    assert load(memory_url, map_location=map_location)["state_dict"]["x"].device.type == "meta"
    assert load(memory_url)["state_dict"]["x"].device.type == "cpu"


def test_weights_only_is_honoured_for_the_skeleton_and_tensors_are_never_unpickled(memory_url: str) -> None:
    with opened(memory_url) as running:
        running.save_now({"x": torch.ones(3), "hyper_parameters": {"activation": nn.ReLU}}, 1)
    with pytest.raises(pickle.UnpicklingError):
        load(memory_url, weights_only=True)
    loaded = load(memory_url, weights_only=False)
    assert loaded["hyper_parameters"]["activation"] is nn.ReLU


# -- into live tensors -----------------------------------------------------------------------------------------------


def test_live_tensors_are_filled_in_place(memory_url: str) -> None:
    training, _ = trained(memory_url)
    expected = load(memory_url)
    live = Training(copy.deepcopy(training.model), training.optimizers[0])
    for tensor in live.model.state_dict().values():
        tensor.fill_(99)
    into = {"state_dict": live.model.state_dict()}
    loaded = load(memory_url, into=into)
    assert_same(loaded, expected)
    for name in ("0.weight", "1.running_mean"):
        assert loaded["state_dict"][name].data_ptr() == live.model.state_dict()[name].data_ptr()


@pytest.mark.parametrize(
    "live",
    [torch.zeros(4, 6).t(), torch.zeros(6, 8)[:, ::2]],
    ids=["transposed", "with gaps"],
)
def test_live_tensors_of_any_layout_are_filled_in_place(live: Tensor, memory_url: str) -> None:
    x = torch.randn(6, 4)
    with opened(memory_url) as running:
        save_tensors(running, 1, x=x)
    loaded = load(memory_url, into={"state_dict": {"x": live}})
    assert torch.equal(live, x)
    assert loaded["state_dict"]["x"].data_ptr() == live.data_ptr()


@pytest.mark.parametrize(
    "other", [torch.zeros(5), torch.zeros(6, dtype=torch.float64), "text"], ids=["shape", "dtype", "kind"]
)
def test_what_does_not_fit_is_left_alone_and_loaded_afresh(other: Any, memory_url: str) -> None:
    x = torch.randn(6)
    with opened(memory_url) as running:
        save_tensors(running, 1, x=x)
    before = copy.deepcopy(other)
    assert_same(load(memory_url, into={"state_dict": {"x": other}})["state_dict"]["x"], x)
    assert_same(other, before)


# -- what a restore tells --------------------------------------------------------------------------------------------


def test_a_restore_tells_its_step_the_versions_and_the_age_of_the_oldest_block(memory_url: str) -> None:
    trained(memory_url)
    restored = restore(DeltaStore(memory_url))
    assert restored.step == 6
    assert {key: version.step for key, version in restored.plan.versions.items()} == saved_steps(memory_url)
    assert restored.oldest_age > 0


def test_frozen_blocks_do_not_make_a_checkpoint_old(memory_url: str) -> None:
    x, frozen = torch.zeros(4), torch.zeros(4)
    with opened(memory_url, fraction=1.0) as running:
        for step in (1, 50):
            x += 1
            save_tensors(running, step, x=x, frozen=frozen)
    assert restore(DeltaStore(memory_url)).oldest_age == 0


# -- what is a running checkpoint ------------------------------------------------------------------------------------


def test_only_directories_with_deltas_are_running_checkpoints(tmp_path: Path, memory_url: str) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"plain")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    for path in ("last.ckpt", "other", "missing"):
        assert not is_running_checkpoint(tmp_path / path)
    for url in (tmp_path / "scar", memory_url):
        with opened(url) as running:
            save_tensors(running, 1, x=torch.ones(2))
        assert is_running_checkpoint(url)


# -- the description of the map --------------------------------------------------------------------------------------

NAMES = st.text(max_size=5)
SIZES = st.integers(1, 9)
PATHS = st.lists(st.one_of(NAMES, st.integers(-3, 9)), max_size=3).map(tuple)
SLOTS = st.builds(
    Slot,
    name=NAMES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex128, torch.bool]),
    stride=st.one_of(st.none(), st.lists(SIZES, max_size=3).map(tuple)),
    paths=st.lists(PATHS, min_size=1, max_size=3).map(tuple),
)
GROUPS = st.builds(
    Group,
    name=NAMES,
    shape=st.lists(SIZES, max_size=3).map(tuple),
    slots=st.lists(SLOTS, min_size=1, max_size=3).map(tuple),
    rows_per_block=SIZES,
    lazy=st.just(False),
)


@given(st.lists(GROUPS, max_size=4).map(tuple), st.integers(0, 9999))
def test_a_map_survives_its_description(groups: tuple[Group, ...], block_size: int) -> None:
    block_map = BlockMap(groups, block_size)
    assert parse(describe(block_map)) == block_map
