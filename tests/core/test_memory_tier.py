"""Saves that go to this host's memory first: what a kill leaves, what storage has alone, and what stays behind."""

import os
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from core_helpers import assert_same
from ranks import run_ranks
from shared_helpers import assert_made_of, copied, make_training, opened, quietly

from lightning_scar.core.restoration import load
from lightning_scar.storage.host_memory import VARIABLE
from lightning_scar.storage.lease import FILE
from lightning_scar.storage.store import DeltaStore
from lightning_scar.storage.tiers import open_store

MEMORY = {"memory": True, "durable_every_n_saves": 4}


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for the memory of a host."""
    folder = tmp_path / "host"
    folder.mkdir()
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "scar")


def state_at(step: int) -> dict[str, Any]:
    """What the training of these tests is like behind a step; all processes train alike."""
    training = make_training()
    while training.steps < step:
        training.step()
    return copied(training)


def folders(host: Path) -> list[str]:
    """The folders of runs in memory."""
    return sorted(path.name for path in host.glob("*/*"))


def killed(rank: int, host: Path, url: str, steps: int, resume: bool = False) -> None:
    """Saves behind every step, and is killed when the last of these saves is where it goes."""
    os.environ[VARIABLE] = str(host)
    training = make_training()
    running = opened(url, fraction=1.0, **MEMORY)
    if resume:
        training.load(quietly(running)[0])
    for _ in range(steps):
        training.step()
        training.save(running)
        running.flush()
    running.ranks.gather(None)
    os.kill(os.getpid(), signal.SIGKILL)


def kill(n: int, *args: Any, **options: Any) -> None:
    failures = run_ranks(killed, n, *args, failing=True, **options)
    assert [failure.type for failure in failures] == ["Ended"] * n, failures


def stored(url: str) -> int:
    """The step of the newest save in storage alone."""
    store = DeltaStore(url)
    store.refresh()
    return max(head.step for head in store.index.heads.values())


def storage_alone(url: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    with monkeypatch.context() as context:
        context.setenv(VARIABLE, "/nowhere")
        return load(url)


# -- what is where -----------------------------------------------------------------------------------------------------


def test_every_save_goes_to_memory_and_every_fourth_to_storage_too(
    url: str, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make_training()
    with opened(url, fraction=1.0, **MEMORY) as running:
        found = []
        for step in range(1, 10):
            training.step()
            training.save(running)
            running.flush()
            assert_same(load(url), state_at(step))
            found.append(stored(url))
            assert_same(storage_alone(url, monkeypatch), state_at(found[-1]))
        assert found == [1, 1, 1, 4, 4, 4, 4, 8, 8]
        assert running.stats.memory_bytes > 0
    assert_same(load(url), state_at(9))
    assert stored(url) == 9
    assert not folders(host)


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_storage_gets_every_block_that_is_newer_in_memory(
    fraction: float, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, history = make_training(), {}
    with opened(url, fraction=fraction, **MEMORY) as running:
        for _ in range(8):
            training.step()
            training.save(running)
            running.flush()
            history[training.steps] = copied(training)
        assert_same(storage_alone(url, monkeypatch), load(url))
        training.step()
        training.save(running)
        running.flush()
        history[training.steps] = copied(training)
        assert_made_of(load(url), history, url)
        assert storage_alone(url, monkeypatch)["global_step"] == 8


def test_a_full_save_is_durable_at_once_and_can_be_read_as_one(url: str) -> None:
    training = make_training()
    with opened(url, fraction=0.3, **MEMORY) as running:
        for step in range(1, 8):
            training.step()
            training.save(running, full=step == 3)
        running.flush()
        assert_same(load(url, consistent=True), state_at(3))


def test_memory_holds_each_block_once(url: str) -> None:
    training = make_training(width=200)
    state = sum(t.nbytes for t in training.checkpoint()["state_dict"].values()) * 3
    with opened(url, fraction=0.25, block_size=4096, **MEMORY) as running:
        for _ in range(40):
            training.step()
            training.save(running)
        running.flush()
        assert running.stats.memory_bytes < 2.3 * state


# -- what a kill leaves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_a_killed_run_goes_on_from_memory(steps: int, url: str, host: Path) -> None:
    kill(1, host, url, steps)
    assert stored(url) <= steps
    with opened(url, fraction=1.0, **MEMORY) as running:
        found, _ = quietly(running)
        assert_same(found, state_at(steps))
        assert "from this host's memory" in running.recovery
        training = make_training()
        training.load(found)
        training.step()
        training.save(running)
        running.flush()
        assert len(folders(host)) == 1, "what the dead one left is not needed any more"
    assert_same(load(url), state_at(steps + 1))
    assert not folders(host)


def test_nothing_is_lost_when_the_next_start_is_killed_before_it_has_saved(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    kill(1, host, url, 0, resume=True)
    assert stored(url) == 4
    kill(1, host, url, 0, resume=True)
    assert_same(load(url), state_at(6))
    kill(1, host, url, 1, resume=True)
    assert_same(load(url), state_at(7))
    assert len(folders(host)) == 1


@pytest.mark.parametrize(("n", "m"), [(2, 2), (2, 1), (2, 3)])
def test_ranks_of_one_host_find_each_others_memory(n: int, m: int, url: str, host: Path) -> None:
    kill(n, host, url, 6)
    for found, recovery in run_ranks(resumed, m, host, url):
        assert_same(found, state_at(6))
        assert "from this host's memory" in recovery
    assert_same(load(url), state_at(7))
    assert not folders(host)


def resumed(rank: int, host: Path, url: str) -> tuple[dict[str, Any], str]:
    os.environ[VARIABLE] = str(host)
    training = make_training()
    with opened(url, fraction=1.0, **MEMORY) as running:
        found, _ = quietly(running)
        training.load(found)
        found = copied(training)
        training.step()
        training.save(running)
        return found, running.recovery


def test_a_start_without_memory_takes_what_is_left_there(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    with opened(url, fraction=0.2) as running:
        found, _ = quietly(running)
        assert_same(found, state_at(6))
        training = make_training()
        training.load(found)
        training.step()
        training.save(running)
    assert not folders(host)
    assert_same(load(url), state_at(7))


def test_without_the_memory_storage_serves(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    shutil.rmtree(host)
    host.mkdir()
    with opened(url, fraction=1.0, **MEMORY) as running:
        assert_same(quietly(running)[0], state_at(4))
        assert "memory" not in running.recovery


def test_a_block_damaged_in_memory_comes_from_storage(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    store = open_store(url)
    store.refresh()
    delta, block = store.index.versions("state_dict/0.weight[0:2]")[0]
    content = bytearray(Path(delta.file).read_bytes())
    content[block.extent[0]] ^= 255
    Path(delta.file).write_bytes(content)
    with opened(url, fraction=1.0, **MEMORY) as running:
        found, said = quietly(running)
    assert "1 block (576 B) from older versions" in said, said
    newest, older = state_at(6), state_at(4)
    newest["state_dict"]["0.weight"][:2] = older["state_dict"]["0.weight"][:2]
    assert_same(found["state_dict"], newest["state_dict"])


# -- whose memory it is ------------------------------------------------------------------------------------------------


def test_a_directory_that_was_begun_anew_does_not_take_the_memory_of_the_old_one(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    shutil.rmtree(url)
    training = make_training()
    with opened(url, fraction=1.0, **MEMORY) as running:
        assert len(folders(host)) == 1, "the old one's is removed"
        training.step()
        training.save(running)
    assert_same(load(url), state_at(1))


def test_what_another_start_has_saved_since_is_not_set_back(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    (Path(url) / FILE).unlink()  # as after a clean end of a run on another host
    with opened(url, fraction=1.0, **MEMORY) as running:
        assert_same(quietly(running)[0], state_at(4))
    assert not folders(host)


def test_another_runs_memory_stays_for_a_day(url: str, host: Path, tmp_path: Path) -> None:
    kill(1, host, url, 6)
    (left,) = host.glob("*/*")
    with opened(tmp_path / "other", **MEMORY) as other:
        assert left.exists()
        assert len(folders(host)) == 2
        yesterday = time.time() - 25 * 3600
        for path in (left, *left.iterdir()):
            os.utime(path, (yesterday, yesterday))
        with opened(tmp_path / "third", **MEMORY):
            assert not left.exists()
            assert len(folders(host)) == 2, "those of live runs"
        assert other.store.memory is not None


def test_nobody_else_can_read_it(url: str, host: Path) -> None:
    training, before = make_training(), os.umask(0)
    try:
        with opened(url, **MEMORY) as running:
            training.save(running)
            running.flush()
            (user,) = host.iterdir()
            assert user.stat().st_mode & 0o777 == 0o700
            assert [path.stat().st_mode & 0o777 for path in user.iterdir()] == [0o700]
    finally:
        os.umask(before)


def test_a_folder_that_others_can_write_to_is_refused(url: str, host: Path) -> None:
    (host / f"scar-memory-{os.getuid()}").mkdir(mode=0o777)
    (host / f"scar-memory-{os.getuid()}").chmod(0o777)
    with pytest.raises(PermissionError, match="not this user's alone"):
        opened(url, **MEMORY)
    assert not (Path(url) / FILE).exists(), "the lease is given back"


def test_a_host_without_memory_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/nowhere")
    with pytest.raises(FileNotFoundError, match="/nowhere is none that can be written to"):
        opened(url, **MEMORY)


# -- no room, no storage -----------------------------------------------------------------------------------------------


def test_what_finds_no_room_in_memory_goes_to_storage(url: str, host: Path) -> None:
    training = make_training()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with opened(url, fraction=1.0, memory_limit=10_000, **MEMORY) as running:
            for step in range(1, 4):
                training.step()
                training.save(running)
                running.flush()
                assert stored(url) == step
    assert len([w for w in caught if "could not go to memory" in str(w.message)]) == 1
    assert_same(load(url), state_at(3))
    assert not folders(host)


def test_what_storage_did_not_take_waits_in_memory_for_the_next_start(url: str, host: Path) -> None:
    training = make_training()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with opened(url, fraction=1.0, **MEMORY) as running:
            for _ in range(2):
                training.step()
                training.save(running)
            running.flush()
            (Path(url) / "rank-0000").rename(Path(url) / "aside")
            (Path(url) / "rank-0000").write_text("in the way")
            for _ in range(4):
                training.step()
                training.save(running)
                running.flush()
        assert running.stats.failed_saves == 2, "the one that was due, and that of the end"
    assert len([w for w in caught if "a save to" in str(w.message)]) == 1
    (Path(url) / "rank-0000").unlink()
    (Path(url) / "aside").rename(Path(url) / "rank-0000")
    with opened(url, fraction=1.0, **MEMORY) as running:
        assert_same(quietly(running)[0], state_at(6))
        training.save(running)
    assert not folders(host)
    assert_same(load(url), state_at(6))


def test_frozen_blocks_stay_when_memory_is_inherited(url: str, host: Path) -> None:
    """What only memory has, and what never changes again, must get to storage before that memory goes."""
    kill(1, host, url, 6)
    with opened(url, fraction=0.1, **MEMORY) as running:
        training = make_training()
        training.load(quietly(running)[0])
        training.save(running)
        running.flush()
        assert len(folders(host)) == 1
    shutil.rmtree(host)
    host.mkdir()
    assert_same(load(url), state_at(6))
    assert torch.equal(load(url)["state_dict"]["0.weight"], training.model[0].weight)
