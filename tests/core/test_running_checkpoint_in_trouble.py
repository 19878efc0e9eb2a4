"""Full disks, kills and damage: nothing that was safe is lost, and training goes on."""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prepared
import pytest
import torch
from core_helpers import (
    Training,
    assert_same,
    damage,
    drain,
    save_tensors,
    saved_steps,
    steps_of,
    writes_failing,
)
from torch import nn, optim

from lightning_scar.core.restoration import IncompleteError, NoCheckpointError, load
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings


def opened(url: str | Path, **settings: Any) -> RunningCheckpoint:
    return RunningCheckpoint(url, Settings(**{"fraction": 1.0, "block_size": 16, **settings}))


def values(url: str | Path) -> list[float]:
    """The distinct values of the tensor ``x`` on disk."""
    found: list[float] = load(url)["state_dict"]["x"].unique().tolist()
    return found


def first_commit_fails(running: RunningCheckpoint) -> Callable[[], None]:
    """Holds writes until the returned function is called; then the first one fails, the others succeed."""
    commit, released, calls = running.store.commit, threading.Event(), iter(range(100))

    def faulty(*args: Any) -> int:
        released.wait()
        if next(calls) == 0:
            raise OSError("No space left on device")
        return commit(*args)

    running.store.commit = faulty
    return released.set


# -- disks that take no writes ---------------------------------------------------------------------------------------


def test_a_failed_write_is_counted_and_warned_of_once_and_the_blocks_are_saved_later(tmp_path: Path) -> None:
    x = torch.zeros(4, 4)
    with opened(tmp_path / "scar", fraction=0.5) as running, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_tensors(running, 1, x=x)
        x[:2] += 1
        with writes_failing(tmp_path / "scar"):
            for step in (2, 3):
                save_tensors(running, step, x=x)
        assert running.stats.failed_saves == 2
        for step in (4, 5):
            save_tensors(running, step, x=x)
    assert steps_of(tmp_path / "scar", "x") == [4, 4, 1, 1]
    assert torch.equal(load(tmp_path / "scar")["state_dict"]["x"], x)
    assert [str(w.message).split(",")[0] for w in caught] == [f"lightning-scar: a save to {tmp_path}/scar failed"]


def test_while_writes_fail_the_older_versions_stay(tmp_path: Path) -> None:
    x = torch.zeros(4, 4)
    with opened(tmp_path / "scar") as running, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_tensors(running, 1, x=x)
        x += 1
        with writes_failing(tmp_path / "scar"):
            save_tensors(running, 2, x=x)
        assert values(tmp_path / "scar") == [0.0]


def test_a_failed_write_stops_training_at_the_next_save_if_asked_to(tmp_path: Path) -> None:
    with opened(tmp_path / "scar", on_write_error="raise") as running:
        save_tensors(running, 1, x=torch.zeros(4, 4))
        with writes_failing(tmp_path / "scar"):
            save_tensors(running, 2, x=torch.ones(4, 4))
            with pytest.raises(OSError, match="rank-0000"):
                running.save({"state_dict": {"x": torch.ones(4, 4)}}, 3)


@pytest.mark.parametrize("on_write_error", ["warn", "raise"])
def test_a_failure_of_the_last_write_is_not_lost_either(on_write_error: Any, tmp_path: Path) -> None:
    running = opened(tmp_path / "scar", on_write_error=on_write_error)
    save_tensors(running, 1, x=torch.zeros(4, 4))
    with writes_failing(tmp_path / "scar"):
        running.save_now({"state_dict": {"x": torch.ones(4, 4)}}, 2)
        if on_write_error == "raise":
            with pytest.raises(OSError, match="rank-0000"):
                running.close()
        else:
            with pytest.warns(UserWarning, match="training continues without it"):
                running.close()
    assert running.stats.failed_saves == 1
    opened(tmp_path / "scar").close()


def test_after_a_failed_first_save_the_next_one_is_full(tmp_path: Path) -> None:
    x = torch.zeros(4, 4)
    with opened(tmp_path / "scar", fraction=0.25) as running:
        with writes_failing(tmp_path / "scar"):
            save_tensors(running, 1, x=x)
        with pytest.warns(UserWarning, match="training continues without it"):
            save_tensors(running, 2, x=x)
        assert running.stats.full_saves == 2
    assert steps_of(tmp_path / "scar", "x") == [2] * 4


def test_a_directory_that_cannot_be_made_does_not_stop_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"cannot be written to.*Training continues"):
        running = opened(tmp_path / "file" / "scar")
    save_tensors(running, 1, x=torch.zeros(4))
    assert running.stats.failed_saves == 1
    with warnings.catch_warnings(record=True):
        running.close()


def test_a_directory_that_cannot_be_made_stops_training_if_asked_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        opened(tmp_path / "file" / "scar", on_write_error="raise")


@pytest.mark.filterwarnings("ignore:lightning-scar")
def test_a_partial_save_behind_a_failed_first_one_does_not_replace_an_older_run(memory_url: str) -> None:
    with opened(memory_url) as running:
        save_tensors(running, 50, x=torch.full((4, 4), 5.0))
    x = torch.zeros(4, 4)
    with opened(memory_url, fraction=0.5) as running:
        release = first_commit_fails(running)
        for step in (1, 2):
            x[0] += 1
            running.save_now({"state_dict": {"x": x}}, step)
        release()
        drain(running)
        assert values(memory_url) == [5.0]
        save_tensors(running, 3, x=x)
        assert torch.equal(load(memory_url)["state_dict"]["x"], x)


@pytest.mark.filterwarnings("ignore:lightning-scar")
def test_a_save_behind_a_failed_one_that_held_new_state_leaves_no_hole(memory_url: str) -> None:
    model = nn.Linear(4, 8)
    training = Training(model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    with opened(memory_url, fraction=0.2) as running:
        training.save(running)
        release = first_commit_fails(running)
        for _ in range(2):
            training.step()
            running.save_now(training.checkpoint(), training.steps, **training._options())
        release()
        drain(running)
        assert load(memory_url)["global_step"] == 0
        for _ in range(2):
            training.step()
            training.save(running)
        assert load(memory_url)["global_step"] == training.steps
        training.save(running, full=True)
    assert_same(load(memory_url), training.checkpoint())


# -- kills -----------------------------------------------------------------------------------------------------------

KILLED_IN_ITS_FIRST_SAVE = """
import os, signal, sys, torch
from lightning_scar.core.running_checkpoint import RunningCheckpoint

running = RunningCheckpoint(sys.argv[1])
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
running.save_now({"state_dict": {"x": torch.zeros(4, 4)}}, 1)
running.close()
"""


def test_a_fresh_run_killed_in_its_first_save_leaves_the_older_run_to_be_read(tmp_path: Path) -> None:
    with opened(tmp_path) as running:
        save_tensors(running, 50, x=torch.full((4, 4), 5.0))
    killed = prepared.run([sys.executable, "-c", KILLED_IN_ITS_FIRST_SAVE, str(tmp_path)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    [torn] = tmp_path.glob("rank-0000/.*.tmp")
    assert torn.stat().st_size > 0
    assert (tmp_path / "lease.json").exists()
    assert values(tmp_path) == [5.0]

    with opened(tmp_path) as running:
        assert not torn.exists()
        x = running.restore().checkpoint["state_dict"]["x"]
        x[0] = 6.0
        save_tensors(running, 51, x=x)
    assert values(tmp_path) == [5.0, 6.0]


def test_half_a_file_beside_its_final_name_is_no_checkpoint_and_is_swept(tmp_path: Path) -> None:
    torn = tmp_path / "rank-0000" / ".delta-00001-00000000.safetensors.123.tmp"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(os.urandom(100))
    with pytest.raises(NoCheckpointError):
        load(tmp_path)
    with opened(tmp_path) as running:
        save_tensors(running, 1, x=torch.zeros(4))
    assert not torn.exists()


# -- damage ----------------------------------------------------------------------------------------------------------


def three_saves(directory: Path) -> list[Path]:
    """Saves rows of ones, twos and threes, in one file each; returns the files."""
    with opened(directory) as running:
        for step in (1, 2, 3):
            save_tensors(running, step, x=torch.full((4, 4), float(step)) + torch.arange(4)[:, None] / 8)
    return sorted(directory.glob("rank-0000/delta-*"))


def row(step: int, number: int) -> bytes:
    return torch.full((4,), step + number / 8).numpy().tobytes()


def test_a_damaged_block_falls_back_to_its_older_version_and_is_named(tmp_path: Path) -> None:
    *_, newest = three_saves(tmp_path)
    before = saved_steps(tmp_path)
    damage(newest, row(3, 2))
    with pytest.warns(UserWarning, match=r"older versions are used") as caught:
        loaded = load(tmp_path)["state_dict"]["x"]
    [message] = [str(warning.message) for warning in caught]
    assert f"block state_dict/x[2:3] of step 3 in {newest}" in message
    assert "x[1:2]" not in message
    assert loaded[[0, 1, 3]].floor().unique().tolist() == [3]
    assert loaded[2].floor().unique().item() in (1, 2)
    assert set(before.values()) == {3}


def test_a_run_resumed_from_a_damaged_checkpoint_goes_on_and_heals_it(tmp_path: Path) -> None:
    *_, newest = three_saves(tmp_path)
    damage(newest, row(3, 2))
    with opened(tmp_path) as running:
        with pytest.warns(UserWarning, match=r"x\[2:3\] of step 3"):
            restored = running.restore()
        x = restored.checkpoint["state_dict"]["x"]
        assert restored.plan.versions["state_dict/x[2:3]"].step < 3
        save_tensors(running, 4, x=x)
        x += 1
        save_tensors(running, 5, x=x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(load(tmp_path)["state_dict"]["x"], x)


def test_the_version_that_stood_in_for_a_damaged_one_is_not_thrown_away(tmp_path: Path) -> None:
    *_, newest = three_saves(tmp_path)
    damage(newest, row(3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in (4, 5, 6):
            with opened(tmp_path) as running:
                x = running.restore().checkpoint["state_dict"]["x"]
                x[0] = step
                save_tensors(running, step, x=x)
        assert torch.equal(load(tmp_path)["state_dict"]["x"], x)


def test_a_file_whose_header_is_damaged_is_passed_over_and_named(tmp_path: Path) -> None:
    *_, newest = three_saves(tmp_path)
    content = bytearray(newest.read_bytes())
    content[40] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=newest.name):
        loaded = load(tmp_path)["state_dict"]["x"]
    assert set(loaded.floor().unique().tolist()) <= {1, 2}


def test_a_file_that_was_cut_off_is_passed_over_and_named(tmp_path: Path) -> None:
    *_, newest = three_saves(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-8])
    with pytest.warns(UserWarning, match=newest.name):
        loaded = load(tmp_path)["state_dict"]["x"]
    assert set(loaded.floor().unique().tolist()) <= {1, 2}


def test_a_damaged_skeleton_falls_back_to_the_older_one(tmp_path: Path) -> None:
    x = torch.zeros(4, 4)
    with opened(tmp_path) as running:
        for step in (1, 2):
            running.save_now({"state_dict": {"x": x}, "note": f"written at step {step}"}, step)
    newest = max(tmp_path.glob("rank-0000/delta-*"))
    damage(newest, b"written at step 2")
    with pytest.warns(UserWarning, match=r"block skeleton-0000 of step 2"):
        assert load(tmp_path)["note"] == "written at step 1"


def test_a_block_with_no_intact_version_left_is_an_error_that_names_it(tmp_path: Path) -> None:
    with opened(tmp_path) as running:
        save_tensors(running, 1, x=torch.full((4, 4), 1.0) + torch.arange(4)[:, None] / 8)
    [only] = tmp_path.glob("rank-0000/delta-*")
    damage(only, row(1, 2))
    with pytest.raises(IncompleteError, match=r"state_dict/x\[2:3\].*not filled with initial values"):
        load(tmp_path)


def test_many_damages_are_counted_rather_than_listed(tmp_path: Path) -> None:
    with opened(tmp_path) as running:
        for step in (1, 2):
            save_tensors(running, step, x=torch.full((20, 4), float(step)))
    newest = max(tmp_path.glob("rank-0000/delta-*"))
    newest.write_bytes(newest.read_bytes().replace(torch.full((4,), 2.0).numpy().tobytes(), bytes(16)))
    with pytest.warns(UserWarning, match="and 12 more"):
        assert values(tmp_path) == [1.0]
