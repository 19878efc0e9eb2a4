"""Copies of what ranks have in memory, on the next hosts: what is lost with a host comes out of them."""

import os
import re
import shutil
import signal
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from core_helpers import assert_same
from memory_helpers import (
    MEMORY,
    files_of,
    hosts_of,
    kill_on_hosts,
    left_behind,
    lose,
    resumed_on_hosts,
    state_at,
    steps_of,
    stored,
    unwritable,
    wait_for_copies,
    warned,
)
from ranks import Failure, run_ranks
from shared_helpers import copied, make_training, opened, quietly

from lightning_scar.core import membership
from lightning_scar.core.restoration import load
from lightning_scar.storage.delta import Delta
from lightning_scar.storage.host_memory import VARIABLE
from lightning_scar.storage.neighbour import Neighbour
from lightning_scar.storage.store import DeltaStore

write = Neighbour.write

pytestmark = pytest.mark.usefixtures("host")


# -- a host is lost ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_what_a_lost_host_had_comes_out_of_the_memory_of_the_next(lost: int, url: str, host: Path) -> None:
    hosts = hosts_of(host, 3)
    kill_on_hosts(hosts, url, 6)
    assert stored(url) == 4
    lose(hosts[lost])
    for found, recovery in run_ranks(resumed_on_hosts, 3, hosts, url):
        assert_same(found, state_at(6))
        assert "newest versions" not in recovery, "something was read from storage"
    assert_same(load(url), state_at(7))
    assert not left_behind(hosts)


def test_two_neighbours_lost_at_once_fall_through_to_storage(url: str, host: Path) -> None:
    hosts = hosts_of(host, 3)
    kill_on_hosts(hosts, url, 6)
    lose(hosts[1])
    lose(hosts[2])
    results = run_ranks(resumed_on_hosts, 3, hosts, url)
    assert "from newest versions" in results[0][1]
    assert "Rank 1 last saved at step 4." in results[0][1]
    new, old = state_at(6)["state_dict"], state_at(4)["state_dict"]
    found = results[0][0]["state_dict"]
    is_old = [torch.equal(found[name][i], old[name][i]) for name in found for i in range(len(found[name]))]
    is_new = [torch.equal(found[name][i], new[name][i]) for name in found for i in range(len(found[name]))]
    assert all(a != b for a, b in zip(is_old, is_new, strict=True))
    assert any(is_old)
    assert any(is_new)
    for other, _ in results[1:]:
        assert_same(other, results[0][0])


def test_two_neighbours_lost_at_once_cost_nothing_where_there_are_two_copies(url: str, host: Path) -> None:
    hosts = hosts_of(host, 3)
    kill_on_hosts(hosts, url, 6, replicas=2)
    for rank, own in enumerate(hosts):
        unstored = files_of(own, rank).keys() - {path.name for path in Path(url).glob(f"rank-{rank:04d}/*")}
        assert len(unstored) == 1
        assert all(files_of(own, rank)[name] == files_of(other, rank)[name] for name in unstored for other in hosts)
    lose(hosts[1])
    lose(hosts[2])
    for found, recovery in run_ranks(resumed_on_hosts, 3, hosts, url):
        assert_same(found, state_at(6))
        assert "newest versions" not in recovery, "something was read from storage"
    assert_same(load(url), state_at(7))
    assert not left_behind(hosts)


# -- a host dies while the others go on --------------------------------------------------------------------------------


def die_together(url: str, rank: int, survivors: set[int]) -> None:
    """Waits for the others without the group, which is broken, and leaves what memory holds as it is."""
    (Path(url).parent / f"done-{rank}").touch()
    while not all((Path(url).parent / f"done-{other}").exists() for other in survivors):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def assert_killed(failures: list[Failure]) -> None:
    assert all(failure.message == "ended with -9 and without a result" for failure in failures), failures


def with_a_tail_that_dies(rank: int, hosts: list[Path], url: str) -> None:
    os.environ[VARIABLE] = str(hosts[rank])
    training = make_training()
    running = opened(url, fraction=1.0, **MEMORY)
    assert running.store.chain is not None
    for step in range(6):
        training.step()
        training.save(running)
        running.flush()
        if step == 1:
            running.ranks.gather(None)
            if rank == 1:
                # Whatever it is about to get.
                os.kill(os.getpid(), signal.SIGKILL)
    wait_for_copies(running)
    if rank == 0:
        assert [Path(memory.partition(":")[2]).parents[2] for memory in running.store.chain.hosts] == [hosts[2]]
    die_together(url, rank, survivors={0, 2})


def test_the_chain_is_repaired_around_a_dead_member(url: str, host: Path) -> None:
    hosts = hosts_of(host, 3)
    assert_killed(run_ranks(with_a_tail_that_dies, 3, hosts, url, failing=True))
    own = [b.key for d in deltas_of(url, 0) for b in d.blocks if b.key.startswith("state_dict/")]
    lose(hosts[0])
    lose(hosts[1])
    found = run_ranks(resumed_on_hosts, 3, hosts, url)[0][0]["state_dict"]
    new = state_at(6)["state_dict"]
    for key in own:
        name, _, span = key.removeprefix("state_dict/").rpartition("[")
        rows = slice(*map(int, span.rstrip("]").split(":")))
        assert torch.equal(found[name][rows], new[name][rows]), key
    assert own


def deltas_of(url: str, rank: int) -> list[Delta]:
    store = DeltaStore(url)
    store.refresh()
    return [delta for delta in store.deltas if delta.head.rank == rank]


def write_slowly(self: Neighbour, name: str, pieces: Iterable[bytes | memoryview]) -> None:
    time.sleep(0.2)
    write(self, name, pieces)


def with_a_tail_that_dies_while_it_catches_up(rank: int, hosts: list[Path], url: str) -> None:
    os.environ[VARIABLE] = str(hosts[rank])
    training = make_training()
    running = opened(url, fraction=0.2, memory=True, durable_every_n_saves=1000)
    for _ in range(8):
        training.step()
        training.save(running)
        running.flush()
    wait_for_copies(running)
    pids = running.ranks.gather(os.getpid())
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while psutil.pid_exists(pids[1]):
        time.sleep(0.01)
    if rank == 0:
        Neighbour.write = write_slowly  # type: ignore[method-assign]
        # That there is nobody any more it notices now, and begins with the next host.
        training.save(running)
        running.flush()
        wait_for_copies(running)
    if rank == 2:
        while not files_of(hosts[2], 0):
            time.sleep(0.01)
        assert len(files_of(hosts[2], 0)) < 7
        os.kill(os.getpid(), signal.SIGKILL)
    die_together(url, rank, survivors={0, 3})


def test_copies_are_completed_elsewhere_when_the_next_host_dies_while_it_catches_up(url: str, host: Path) -> None:
    hosts = hosts_of(host, 4)
    assert_killed(run_ranks(with_a_tail_that_dies_while_it_catches_up, 4, hosts, url, failing=True))
    stored_names = {path.name for path in Path(url).glob("rank-0000/*")}
    unstored = {name: data for name, data in files_of(hosts[0], 0).items() if name not in stored_names}
    assert files_of(hosts[3], 0) == unstored
    assert 0 < len(files_of(hosts[2], 0)) < len(unstored)


# -- the limit ---------------------------------------------------------------------------------------------------------


def bytes_of(host: Path, rank: int) -> int:
    return sum(map(len, files_of(host, rank).values()))


def goes_on_within_a_limit(rank: int, hosts: list[Path], url: str, limit: int) -> OSError | None:
    os.environ[VARIABLE] = str(hosts[rank])
    training = make_training()
    with opened(url, fraction=1.0, memory_limit=limit, **MEMORY) as running:
        training.load(quietly(running)[0])
        training.save(running)
        running.flush()
        return running.store.directory.trouble


def test_copies_that_dead_starts_have_left_take_no_room_from_a_ranks_own_files(url: str, host: Path) -> None:
    hosts = hosts_of(host, 2)
    kill_on_hosts(hosts, url, 6)
    limit = int(3.5 * max(bytes_of(own, rank) for rank, own in enumerate(hosts)))
    assert run_ranks(goes_on_within_a_limit, 2, hosts, url, limit) == [None, None]
    assert not left_behind(hosts)


def without_room_for_copies(rank: int, hosts: list[Path], url: str) -> tuple[int, str, list[str]]:
    os.environ[VARIABLE] = str(hosts[rank])
    training = make_training()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        limit = 10_000 if rank == 1 else None
        with opened(url, fraction=1.0, memory=True, durable_every_n_saves=1000, memory_limit=limit) as running:
            for _ in range(12):
                training.step()
                training.save(running)
                running.flush()
            running.ranks.gather(None)
            assert running.store.chain is not None
            trouble = str(running.store.chain.trouble)
        return running.stats.unreplicated_saves, trouble, [str(warning.message) for warning in caught]


def test_copies_that_find_no_room_are_counted_and_warned_of_once(url: str, host: Path) -> None:
    hosts = hosts_of(host, 2)
    behind, trouble, said = run_ranks(without_room_for_copies, 2, hosts, url)[0]
    # Whether the last one was refused yet is up to the thread that copies.
    assert behind in (11, 12)
    assert re.search(r"no room for \d{5} bytes, this rank has taken 0 of 10000 there: raise memory_limit", trouble)
    assert len([text for text in said if "lag" in text and "saves behind" in text]) == 1
    assert_same(load(url), state_at(12))
    assert not left_behind(hosts)


# -- who serves --------------------------------------------------------------------------------------------------------


def listens(rank: int, hosts: list[Path], url: str) -> list[str]:
    os.environ[VARIABLE] = str(hosts[rank])
    with opened(url, **MEMORY) as running:
        found = psutil.Process().net_connections()
        running.ranks.gather(None)
        return [connection.laddr.ip for connection in found if connection.status == "LISTEN"]


def test_one_host_serves_nobody(url: str, host: Path) -> None:
    (one,) = hosts_of(host, 1)
    alone, shared = run_ranks(listens, 2, [one, one], url), run_ranks(listens, 2, hosts_of(host, 2), url)
    assert all(len(more) == len(less) + 1 for less, more in zip(alone, shared, strict=True))
    assert {address for addresses in shared for address in addresses} == {"127.0.0.1"}


# -- copies that go, memory that cannot be read ------------------------------------------------------------------------


def removes_copies(rank: int, hosts: list[Path], url: str) -> None:
    os.environ[VARIABLE] = str(hosts[rank])
    training = make_training()
    running = opened(url, fraction=0.3, memory=True, durable_every_n_saves=1000)
    for step in range(6):
        training.step()
        training.save(running)
        running.flush()
        wait_for_copies(running)
        running.ranks.gather(None)
        if step == 4 and rank == 1:
            shutil.rmtree(next(hosts[1].glob("*/*/*/rank-0000")))
        running.ranks.gather(None)
    os.kill(os.getpid(), signal.SIGKILL)


def test_copies_that_somebody_removes_are_made_again(url: str, host: Path) -> None:
    hosts = hosts_of(host, 2)
    run_ranks(removes_copies, 2, hosts, url, failing=True)
    stored_names = {path.name for path in Path(url).glob("rank-0000/*")}
    assert files_of(hosts[1], 0).keys() == files_of(hosts[0], 0).keys() - stored_names
    assert len(files_of(hosts[1], 0)) > 3


def resumed_where_a_host_cannot_write(rank: int, hosts: list[Path], url: str) -> tuple[dict[str, Any], str, list[str]]:
    os.environ[VARIABLE] = str(hosts[rank])
    if rank == 1:
        membership.bring_in = unwritable
    training = make_training()
    with warned() as said, opened(url, fraction=1.0, **MEMORY) as running:
        training.load(running.restore().checkpoint)
        found = copied(training)
        training.step()
        training.save(running)
    return found, running.recovery, said


def test_without_what_one_host_cannot_bring_to_storage_all_ranks_go_on_alike(url: str, host: Path) -> None:
    hosts = hosts_of(host, 2)
    kill_on_hosts(hosts, url, 6, replicas=0)
    (first, recovery, said), (second, _, more) = run_ranks(resumed_where_a_host_cannot_write, 2, hosts, url)
    assert_same(second, first)
    assert set(steps_of(first, 4, 6)) == {4, 6}, "what the other host had serves"
    assert "from newest versions" in recovery
    assert sum("cannot be copied to storage (rank 1: OSError('the disk is full'))" in text for text in said) == 1
    assert not any("cannot be brought" in text for text in more)
    assert load(url)["global_step"] == 7
