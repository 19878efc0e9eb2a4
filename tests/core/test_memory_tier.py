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
from memory_helpers import (
    MEMORY,
    folders,
    heal,
    hosts_of,
    kill,
    kill_on_hosts,
    resumed,
    resumed_on_hosts,
    state_at,
    storage_alone,
    stored,
    train_and_spoil,
    unwritable,
)
from ranks import run_ranks
from shared_helpers import assert_made_of, copied, make_training, opened, quietly

from lightning_scar.core.restoration import load
from lightning_scar.storage.host_memory import VARIABLE
from lightning_scar.storage.lease import FILE
from lightning_scar.storage.places import open_store

pytestmark = pytest.mark.usefixtures("host")


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
    assert stored(url) == 6, "what memory had is brought to storage first"
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


def test_a_start_without_memory_takes_what_is_left_there(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    with opened(url, fraction=1.0) as running:
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
    content[next(iter(block.slots.values())).start] ^= 255
    Path(delta.file).write_bytes(content)
    with opened(url, fraction=1.0, **MEMORY) as running:
        found, said = quietly(running)
    assert "1 block (576 B) from older versions" in said, said
    newest, older = state_at(6), state_at(1)
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
    (left,) = host.glob("*/*/*")
    with opened(tmp_path / "other", **MEMORY) as other:
        assert left.exists()
        assert len(folders(host)) == 2
        yesterday = time.time() - 25 * 3600
        for path in (left, *left.iterdir()):
            os.utime(path, (yesterday, yesterday))
        with opened(tmp_path / "third", **MEMORY):
            assert not left.exists()
            assert len(folders(host)) == 2, "those of live runs"
        assert other.store.write_back is not None


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


@pytest.mark.parametrize("place", ["/nowhere", "/proc", __file__])
def test_a_host_without_memory_is_told(place: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, place)
    with pytest.raises(FileNotFoundError, match=f"{place} cannot be written to .* Set {VARIABLE} to"):
        opened(url, **MEMORY)


def test_memory_that_would_be_elsewhere_after_a_chdir_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "memory")
    with pytest.raises(ValueError, match=f"{VARIABLE}='memory' must be an absolute path"):
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


# -- several hosts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [[0, 1], [1, 0], [0, 0], [1], [0, 1, 2]], ids=str)
def test_what_other_hosts_have_in_memory_is_read_from_there(places: list[int], url: str, host: Path) -> None:
    hosts = hosts_of(host, 3)
    kill_on_hosts(hosts[:2], url, 6, replicas=0)
    results = run_ranks(resumed_on_hosts, len(places), [hosts[i] for i in places], url)
    for found, recovery in results:
        if len(places) > 1 and set(places) >= {0, 1}:
            assert_same(found, state_at(6))
            assert "from a neighbour's memory" in recovery
            assert "from this host's memory" in recovery or places in ([0, 1, 2], [1, 0])
        assert found["global_step"] == 6
    assert_same(load(url), copied_from(results[0][0]))
    for place in set(places):
        assert not folders(hosts[place])


def copied_from(found: dict[str, Any]) -> dict[str, Any]:
    """The state a step after one that was resumed from."""
    training = make_training()
    training.load(found)
    training.step()
    return copied(training)


def heals_on_hosts(rank: int, hosts: list[Path], url: str) -> dict[str, Any]:
    os.environ[VARIABLE] = str(hosts[rank])
    training = make_training()
    with opened(url, fraction=1.0, replicas=0, **MEMORY) as running:
        train_and_spoil(training, running, 3)
        plan = heal(training, running)
        assert "from this host's memory" in plan, plan
        return copied(training)


def test_healing_takes_what_only_another_hosts_memory_had(url: str, host: Path) -> None:
    for healed in run_ranks(heals_on_hosts, 2, hosts_of(host, 2), url):
        assert_same(healed, state_at(3))


# -- whatever comes between --------------------------------------------------------------------------------------------


def test_a_restart_that_ends_before_it_has_saved_loses_nothing(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    with opened(url, fraction=1.0, **MEMORY) as running:
        quietly(running)
    assert_same(load(url), state_at(6))
    with opened(url, fraction=1.0, **MEMORY) as running:
        assert_same(quietly(running)[0], state_at(6))


def test_a_restart_that_cannot_begin_loses_nothing(url: str, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill(1, host, url, 6)
    monkeypatch.setenv(VARIABLE, "/nowhere")
    with pytest.raises(FileNotFoundError):
        opened(url, **MEMORY)
    monkeypatch.setenv(VARIABLE, str(host))
    assert_same(load(url), state_at(6))


def closes_when_the_other_is_killed(rank: int, host: Path, url: str) -> None:
    os.environ[VARIABLE] = str(host)
    training = make_training()
    with opened(url, fraction=1.0, **MEMORY) as running:
        for _ in range(6):
            training.step()
            training.save(running)
            running.flush()
        running.ranks.gather(None)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_rank_has_in_memory_outlives_the_end_of_the_others(url: str, host: Path) -> None:
    failures = run_ranks(closes_when_the_other_is_killed, 2, host, url, failing=True)
    assert [failure is None for failure in failures] == [True, False]
    assert_same(load(url), state_at(6))
    for found, _ in run_ranks(resumed, 2, host, url):
        assert_same(found, state_at(6))
    assert not folders(host)


def begins_anew_without_storage(rank: int, host: Path, url: str) -> None:
    os.environ[VARIABLE] = str(host)
    training = make_training()
    running = opened(url, fraction=1.0, **MEMORY)
    if rank == 1:
        running.store.directory.storage.write = unwritable  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(9):
            training.step()
            training.save(running)
            running.flush()
            running.ranks.gather(None)
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_older_training_stays_until_the_new_one_is_whole_in_storage(
    url: str, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(url, fraction=1.0) as running:
        training = make_training()
        for _ in range(3):
            training.step()
        training.save(running)
    failures = run_ranks(begins_anew_without_storage, 2, host, url, failing=True)
    assert [failure.type for failure in failures] == ["Ended"] * 2, failures
    assert_same(storage_alone(url, monkeypatch), state_at(3))


@pytest.mark.parametrize("what", ["parameter", "moment"])
def test_what_turned_nan_before_the_first_save_does_not_replace_what_memory_has(
    what: str, url: str, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(1, host, url, 6)
    training = make_training()
    with warnings.catch_warnings(), opened(url, fraction=1.0, **MEMORY) as running:
        warnings.simplefilter("ignore")
        training.load(quietly(running)[0])
        broken = training.model[0].weight
        target = broken if what == "parameter" else training.optimizers[0].state[broken]["exp_avg"]
        with torch.no_grad():
            target[:2] = torch.nan
        training.steps += 1
        training.save(running)
        running.flush()
        assert running.stats.non_finite_blocks == 1
    assert not folders(host)
    assert_same(storage_alone(url, monkeypatch)["state_dict"], state_at(6)["state_dict"])


def test_a_file_that_cannot_be_opened_holds_no_later_save_up(url: str, host: Path) -> None:
    training = make_training()
    with warnings.catch_warnings(), opened(url, fraction=1.0, memory=True, durable_every_n_saves=1) as running:
        warnings.simplefilter("ignore")
        assert running.store.write_back is not None
        training.save(running)
        running.flush()
        memory = running.store.write_back.memory
        open_file = memory.open
        memory.open = unwritable  # type: ignore[method-assign]
        for _ in range(4):
            training.step()
            training.save(running)
            running.flush()
        memory.open = open_file  # type: ignore[method-assign]
        training.step()
        training.save(running)
        running.flush()
        assert running.stats.failed_saves == 4
        assert stored(url) == 5
    assert_same(load(url), state_at(5))
