"""Memory that somebody removes, or takes the name of, or that is full."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from core_helpers import assert_same, rows_of, saved_steps
from memory_helpers import (
    MEMORY,
    folders,
    hosts_of,
    kill,
    kill_on_hosts,
    left_behind,
    mount,
    resumed_on_hosts,
    state_at,
    storage_alone,
    stored,
    unmount,
    warned,
)
from ranks import run_ranks
from shared_helpers import assert_made_of, copied, make_training, opened, quietly

from lightning_scar.core.restoration import load
from lightning_scar.storage.lease import FILE
from lightning_scar.storage.places import open_store

pytestmark = pytest.mark.usefixtures("host")


# -- removed in mid-run ------------------------------------------------------------------------------------------------


def everything(host: Path) -> None:
    shutil.rmtree(next(host.iterdir()))


def the_start(host: Path) -> None:
    shutil.rmtree(next(host.glob("*/*/*")))


def the_rank(host: Path) -> None:
    shutil.rmtree(next(host.glob("*/*/*/*")))


def one_file(host: Path) -> None:
    max(host.glob("*/*/*/*/*"), key=lambda path: path.stat().st_mtime_ns).unlink()


@pytest.mark.parametrize("remove", [everything, the_start, the_rank, one_file])
def test_memory_that_is_removed_is_noticed_at_the_next_save_and_made_whole_again(
    remove: Callable[[Path], None], url: str, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, history = make_training(), {}
    with warned() as said, opened(url, fraction=0.3, memory=True, durable_every_n_saves=100) as running:
        for _ in range(5):
            training.step()
            training.save(running)
            running.flush()
            history[training.steps] = copied(training)
        assert stored(url) == 1
        remove(host)
        # Nothing changes any more: only what is known to be lost is saved.
        training.save(running)
        running.flush()
        assert_made_of(load(url), history, url)
        assert stored(url) == 5
        training.save(running)
        running.flush()
        assert_same(storage_alone(url, monkeypatch), state_at(5))
        for _ in range(3):
            training.step()
            training.save(running)
            running.flush()
            history[training.steps] = copied(training)
        assert stored(url) == 5, "memory is used again"
        assert_made_of(load(url), history, url)
        assert all(path.stat().st_mode & 0o077 == 0 for path in host.glob("*"))
        with opened(Path(url).parent / "other", **MEMORY):
            assert len(folders(host)) == 2
    assert len([text for text in said if "somebody has removed" in text]) == 1, said
    assert_made_of(load(url), history, url)
    assert not folders(host)


def test_memory_that_is_removed_before_the_first_save_is_made_again(url: str, host: Path) -> None:
    training = make_training()
    with opened(url, fraction=1.0, **MEMORY) as running:
        everything(host)
        for _ in range(3):
            training.step()
            training.save(running)
            running.flush()
        assert_same(load(url), state_at(3))
        assert stored(url) == 1
    assert not folders(host)


@pytest.mark.parametrize("is_back", [False, True])
def test_saves_go_to_storage_while_memory_cannot_be_made_again(is_back: bool, url: str, host: Path) -> None:
    training = make_training()
    with warned() as said, opened(url, fraction=1.0, **MEMORY) as running:
        for _ in range(7):
            training.step()
            training.save(running)
            running.flush()
            if training.steps == 2:
                shutil.rmtree(host)
            if training.steps >= 3:
                assert stored(url) == training.steps or is_back
            if training.steps == 4 and is_back:
                host.mkdir()
        assert running.stats.failed_saves == 0
        assert_same(load(url), state_at(7))
    assert len([text for text in said if "could not go to memory" in text]) == 1


def test_memory_that_is_removed_at_the_end_is_told(url: str, host: Path) -> None:
    training = make_training()
    with warned() as said, opened(url, fraction=1.0, **MEMORY) as running:
        for _ in range(2):
            training.step()
            training.save(running)
        running.flush()
        everything(host)
    assert len([text for text in said if "somebody has removed" in text]) == 1
    assert_same(load(url), state_at(1))


def test_inherited_memory_that_is_removed_holds_no_save_up(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    training = make_training()
    with opened(url, fraction=1.0, **MEMORY) as running:
        training.load(quietly(running)[0])
        for left in host.glob("*/*/*"):
            if any(left.glob("*/*")):
                shutil.rmtree(left)
        training.step()
        training.save(running)
        assert running.stats.failed_saves == 0
    assert_same(load(url), state_at(7))


# -- names that others have taken --------------------------------------------------------------------------------------


def a_folder_for_all(name: Path) -> None:
    name.mkdir()
    name.chmod(0o777)


def a_folder_of_another(name: Path) -> None:
    if os.getuid():
        pytest.skip("only root can make what belongs to another user")
    name.mkdir(mode=0o700)
    os.chown(name, 12345, 12345)


def a_file(name: Path) -> None:
    name.write_text("mine")


def a_link(name: Path) -> None:
    aside = name.with_name("aside")
    aside.mkdir(mode=0o700)
    name.symlink_to(aside)


@pytest.mark.parametrize("squat", [a_folder_for_all, a_folder_of_another, a_file, a_link])
def test_a_name_that_is_taken_is_passed_over_and_the_folder_found_again(
    squat: Callable[[Path], None], url: str, host: Path
) -> None:
    name = host / f"scar-memory-{os.getuid()}"
    squat(name)
    kill(1, host, url, 6)
    (mine,) = host.glob("*/*/*/rank-0000")
    assert mine.parents[2] == name.with_name(f"{name.name}-1")
    name.rename(host / "gone")
    assert_same(load(url), state_at(6))
    with opened(url, fraction=1.0, **MEMORY) as running:
        assert_same(quietly(running)[0], state_at(6))
        make_training().save(running)
    assert not list(host.glob("scar-memory*/*"))
    assert not list(host.glob("aside/*"))


# -- no room -----------------------------------------------------------------------------------------------------------


def bytes_in(host: Path) -> int:
    return sum(path.stat().st_size for path in host.rglob("*") if path.is_file())


@pytest.mark.parametrize("missing", [0, 1])
def test_the_limit_counts_every_byte_of_a_save(missing: int, url: str, host: Path) -> None:
    training = make_training()
    with opened(url, fraction=1.0, **MEMORY) as running:
        training.save(running)
        running.flush()
        needed = bytes_in(host)
    with opened(f"{url}-2", fraction=1.0, memory_limit=needed - missing, **MEMORY) as running, warned() as said:
        training.save(running)
        running.flush()
        assert bytes_in(host) == (0 if missing else needed)
        training.save(running)
        running.flush()
    assert sum("could not go to memory" in text for text in said) == missing


def test_the_limit_counts_what_dead_starts_have_left(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    limit = 2 * bytes_in(host)
    with warned(), opened(url, fraction=1.0, memory_limit=limit - 1000, **MEMORY) as running:
        training = make_training()
        training.load(quietly(running)[0])
        training.save(running)
        running.flush()
        assert 0 < bytes_in(host) <= limit
        training.step()
        training.save(running)
        running.flush()
        assert bytes_in(host) <= limit
    assert_same(load(url), state_at(7))


def test_full_memory_is_emptied_into_storage_and_used_again(url: str, host: Path) -> None:
    training, history = make_training(), {}
    with opened(url, **MEMORY) as running:
        training.save(running)
        running.flush()
        limit = int(1.5 * bytes_in(host))
    used = []
    with warned(), opened(f"{url}-2", memory_limit=limit, memory=True, durable_every_n_saves=1000) as running:
        for _ in range(30):
            training.step()
            training.save(running)
            running.flush()
            history[training.steps] = copied(training)
            assert_made_of(load(f"{url}-2"), history, f"{url}-2")
            assert bytes_in(host) <= limit
            used.append(bytes_in(host))
        assert running.stats.failed_saves == 0
    assert all(used[-10:]), "memory serves still"
    assert_made_of(load(f"{url}-2"), history, f"{url}-2")


def test_the_lease_is_given_back_where_there_is_no_memory(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_SCAR_MEMORY", "/nowhere")
    with pytest.raises(FileNotFoundError):
        opened(url, **MEMORY)
    assert not (Path(url) / FILE).exists()


# -- damaged -----------------------------------------------------------------------------------------------------------


def damage_in(host: Path, url: str, key: str) -> None:
    """Damages the newest version of a block, in memory."""
    store = open_store(url)
    store.refresh()
    delta, block = store.index.versions(key)[0]
    assert Path(delta.file).is_relative_to(host)
    content = bytearray(Path(delta.file).read_bytes())
    content[next(iter(block.slots.values())).start] ^= 255
    Path(delta.file).write_bytes(content)


def test_a_block_damaged_in_memory_does_not_keep_the_others_from_storage(
    url: str, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make_training()
    with warned() as said, opened(url, fraction=0.3, memory=True, durable_every_n_saves=3) as running:
        for _ in range(2):
            training.step()
            training.save(running)
            running.flush()
        assert stored(url) == 1
        key = next(key for key, step in saved_steps(url).items() if step == 2 and "0.weight" in key)
        damage_in(host, url, key)
        # Nothing changes any more, and older blocks go first: the damaged version is what is to go to storage.
        for _ in range(2):
            training.save(running)
            running.flush()
        assert running.stats.failed_saves == 0
        found = storage_alone(url, monkeypatch)["state_dict"]["0.weight"]
        assert stored(url) == 2
        assert torch.equal(found[rows_of(key)], state_at(1)["state_dict"]["0.weight"][rows_of(key)])
        training.save(running, full=True)
    assert any("older versions are used" in text for text in said)
    assert_same(load(url), state_at(2))


def test_a_block_damaged_in_inherited_memory_holds_no_save_up(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    training = make_training()
    with warned(), opened(url, fraction=1.0, **MEMORY) as running:
        training.load(quietly(running)[0])
        damage_in(host, url, "state_dict/0.weight[0:2]")
        with torch.no_grad():
            training.model[0].weight[:2] = torch.nan
        training.save(running)
        running.flush()
        assert running.stats.failed_saves == 0
    assert not folders(host)


# -- a real tmpfs ------------------------------------------------------------------------------------------------------


def test_a_tmpfs_that_is_full_is_emptied_and_used_again(url: str, host: Path) -> None:
    mount(host, "64k")
    try:
        training, used = make_training(), []
        with warned() as said, opened(url, fraction=1.0, memory=True, durable_every_n_saves=1000) as running:
            for step in range(1, 9):
                training.step()
                training.save(running)
                running.flush()
                assert_same(load(url), state_at(step))
                used.append(stored(url) < step)
            assert running.stats.failed_saves == 0
        assert True in used
        assert False in used[1:]
        assert len([text for text in said if "No space left" in text]) == 1
        assert not folders(host)
    finally:
        unmount(host)


def test_a_tmpfs_that_is_mounted_anew_in_mid_run_is_noticed(
    url: str, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount(host, "10m")
    try:
        training = make_training()
        with warned() as said, opened(url, fraction=1.0, memory=True, durable_every_n_saves=1000) as running:
            for _ in range(3):
                training.step()
                training.save(running)
                running.flush()
            unmount(host)
            mount(host, "10m")
            for _ in range(2):
                training.step()
                training.save(running)
                running.flush()
                assert_same(storage_alone(url, monkeypatch), state_at(training.steps))
            training.step()
            training.save(running)
            running.flush()
            assert stored(url) == 5
            assert_same(load(url), state_at(6))
        assert len([text for text in said if "somebody has removed" in text]) == 1
        assert not folders(host)
    finally:
        unmount(host)


# -- several runs ------------------------------------------------------------------------------------------------------


def test_what_a_live_run_has_inherited_is_not_swept_by_another_run(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    (left,) = host.glob("*/*/*")
    yesterday = time.time() - 25 * 3600
    for path in (left, *left.iterdir()):
        os.utime(path, (yesterday, yesterday))
    with opened(url, fraction=1.0, **MEMORY) as running:
        with opened(f"{url}-2", **MEMORY):
            assert left.exists()
        assert_same(quietly(running)[0], state_at(6))


def test_a_directory_that_is_begun_anew_beside_a_live_run_leaves_no_memory_in_the_end(url: str, host: Path) -> None:
    training = make_training()
    old = opened(url, fraction=1.0, **MEMORY)
    training.step()
    training.save(old)
    old.flush()
    shutil.rmtree(url)
    with opened(url, fraction=1.0, **MEMORY) as new:
        training.step()
        training.save(new)
        new.flush()
        assert len(folders(host)) == 2, "the old one still holds its own"
    with warned():
        old.close()
    assert_same(load(url), state_at(2))
    with opened(url, fraction=1.0, **MEMORY) as running:
        assert_same(quietly(running)[0], state_at(2))
        assert len(folders(host)) == 1
    assert not folders(host)


def test_memory_that_cannot_be_made_again_is_done_without(url: str, host: Path) -> None:
    training, history = make_training(), {}
    with warned() as said, opened(url, **MEMORY) as running:
        for step in range(8):
            if step == 3:
                shutil.rmtree(host)
                host.write_text("no folder any more")
            training.step()
            training.save(running)
            running.flush()
            history[training.steps] = copied(training)
            if step > 3:
                assert stored(url) == training.steps
                assert_made_of(load(url), history, url)
        assert running.stats.full_saves == 2, "the first one, and one to make up for what was lost"
        assert running.stats.failed_saves == 0
    assert len([text for text in said if "somebody has removed" in text]) == 1
    assert len([text for text in said if "could not go to memory" in text]) == 1


@pytest.mark.parametrize("sizes", [[2, 1, 3, 2, 1], [1, 3, 3, 1, 2]], ids=str)
def test_nothing_is_lost_or_left_however_many_ranks_each_start_has(sizes: list[int], url: str, host: Path) -> None:
    steps = [6, 1, 0, 5, 2]
    for i, (n, more) in enumerate(zip(sizes, steps, strict=True)):
        kill(n, host, url, more, resume=i > 0)
        assert_same(load(url), state_at(sum(steps[: i + 1])))
    with opened(url, fraction=1.0, **MEMORY) as running:
        training = make_training()
        training.load(quietly(running)[0])
        training.step()
        training.save(running)
    assert not folders(host)
    assert_same(load(url), state_at(sum(steps) + 1))


def test_a_host_that_is_not_there_any_more_has_its_memory_cleaned_up_when_it_is_back(url: str, host: Path) -> None:
    hosts = hosts_of(host, 2)
    kill_on_hosts(hosts, url, 6)
    run_ranks(resumed_on_hosts, 1, hosts[:1], url)
    assert not left_behind(hosts[:1])
    assert left_behind(hosts[1:])
    results = run_ranks(resumed_on_hosts, 2, hosts, url)
    assert results[0][0]["global_step"] == 7
    assert not left_behind(hosts)
