"""What starts that died have left in memory: it does not pile up, any way leads to it, and its loss is told."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from core_helpers import assert_same
from memory_helpers import MEMORY, folders, kill, lose, resumed, state_at, steps_of, unwritable, warned
from ranks import run_ranks
from shared_helpers import copied, make_training, opened, quietly

from lightning_scar.core.membership import RunMembership
from lightning_scar.core.restoration import load
from lightning_scar.storage.host_memory import VARIABLE

pytestmark = pytest.mark.usefixtures("host")

IS_LOST = "none of these hosts has that memory"


def said_on_resuming(url: str | Path, **options: object) -> list[str]:
    training = make_training()
    with warned() as said, opened(url, fraction=1.0, **{**MEMORY, **options}) as running:
        training.load(running.restore().checkpoint)
        training.step()
        training.save(running)
    return [text for text in said if IS_LOST in text]


# -- more and more of them ---------------------------------------------------------------------------------------------


def dies_before_storage_has_its_save(rank: int, host: Path, url: str, step: int, savers: int) -> None:
    os.environ[VARIABLE] = str(host)
    training = make_training()
    running = opened(url, fraction=1.0, **MEMORY)
    quietly(running)
    while training.steps < step:
        training.step()

    if rank < savers:
        training.save(running)
        running.flush()
    running.ranks.gather(None)
    os.kill(os.getpid(), signal.SIGKILL)


def die_one_after_the_other(n: int, host: Path, url: str, savers: int) -> list[int]:
    """Four starts; returns the bytes in memory behind each."""
    used = []
    for step in range(4, 8):
        failures = run_ranks(dies_before_storage_has_its_save, n, host, url, step, savers, failing=True)
        assert [failure.type for failure in failures] == ["Ended"] * n, failures
        used.append(sum(path.stat().st_size for path in host.glob("*/*/*/*/*")))
    return used


@pytest.mark.parametrize("n", [1, 2])
def test_starts_that_die_before_storage_has_their_saves_do_not_pile_up(n: int, url: str, host: Path) -> None:
    kill(n, host, url, 3)
    used = die_one_after_the_other(n, host, url, savers=n)
    assert used[-1] <= 1.1 * used[0]
    for found, _ in run_ranks(resumed, n, host, url):
        assert_same(found, state_at(7))
    assert not folders(host)


def test_a_start_that_only_one_rank_has_saved_replaces_no_other_ranks_blocks(url: str, host: Path) -> None:
    kill(2, host, url, 3)
    used = die_one_after_the_other(2, host, url, savers=1)
    assert used[-1] <= 1.1 * used[1]
    for found, _ in run_ranks(resumed, 2, host, url):
        assert set(steps_of(found, 3, 7)) == {3, 7}
    assert not folders(host)


def test_what_was_read_stays_however_new_storage_looks(url: str, host: Path) -> None:
    """Nobody has read what storage has, which is damaged here."""
    kill(1, host, url, 1)
    for file in Path(url).glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-2000] + bytes(2000))
    run_ranks(dies_after_restoring, 1, host, url, **MEMORY, failing=True)
    ((found, _),) = run_ranks(resumed, 1, host, url)
    assert_same(found, state_at(1))


# -- memory that is gone -----------------------------------------------------------------------------------------------


def test_the_loss_of_all_memory_is_told(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    lose(host)
    assert len(said_on_resuming(url)) == 1
    assert not said_on_resuming(url), "it ended well since"


def test_the_loss_is_told_by_the_start_that_restores(url: str, host: Path) -> None:
    """Not by one that ended before."""
    kill(1, host, url, 6)
    lose(host)
    with opened(url, fraction=1.0, **MEMORY):
        pass
    assert len(said_on_resuming(url)) == 1


def test_what_a_start_without_memory_has_read_is_lost_no_more(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    run_ranks(dies_after_restoring, 1, host, url, failing=True)
    lose(host)
    assert not said_on_resuming(url), "it has brought all of it to storage"
    assert load(url)["global_step"] == 7


def dies_after_restoring(rank: int, host: Path, url: str, **options: Any) -> None:
    os.environ[VARIABLE] = str(host)
    quietly(opened(url, fraction=1.0, **options))
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_loss_of_what_storage_did_not_take_is_told(url: str, host: Path) -> None:
    training = make_training()
    with warned(), opened(url, fraction=1.0, **MEMORY) as running:
        for _ in range(2):
            training.step()
            training.save(running)
            running.flush()
            running.store.directory.storage.write = unwritable
    lose(host)
    assert len(said_on_resuming(url)) == 1


def dies_on_its_way_in(rank: int, host: Path, url: str) -> None:
    os.environ[VARIABLE] = str(host)
    RunMembership._follow = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    opened(url, fraction=1.0, **MEMORY)


def test_a_start_that_died_before_it_had_memory_has_lost_none(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    run_ranks(dies_on_its_way_in, 1, host, url, failing=True)
    assert not said_on_resuming(url)
    assert not folders(host)


def test_a_directory_that_was_moved_is_told_of(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    shutil.move(url, moved := f"{url}-moved")
    assert len(said_on_resuming(moved, memory=False)) == 1


def test_nothing_is_told_where_nothing_is_lost(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    assert not said_on_resuming(url)
    assert not said_on_resuming(url)
    shutil.rmtree(url)
    kill(1, host, url, 0)
    training = make_training()
    with warned() as said, opened(url, fraction=1.0, **MEMORY) as running:
        training.step()
        training.save(running)
    assert not said


def test_a_link_to_the_directory_leads_to_its_memory(url: str, host: Path) -> None:
    kill(1, host, url, 6)
    os.symlink(url, link := f"{url}-link")
    assert_same(load(link), state_at(6))
    training = make_training()
    with opened(link, fraction=1.0, **MEMORY) as running:
        training.load(quietly(running)[0])
        assert_same(copied(training), state_at(6))
        training.step()
        training.save(running)
    assert not folders(host)
