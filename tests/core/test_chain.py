"""Copies of what ranks have in memory, on the next hosts: what is lost with a host comes out of them."""

import os
import signal
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch
from core_helpers import assert_same
from memory_helpers import (
    MEMORY,
    hosts_of,
    kill_on_hosts,
    left_behind,
    lose,
    resumed_on_hosts,
    state_at,
    stored,
    wait_for_copies,
)
from ranks import run_ranks
from shared_helpers import make_training, opened

from lightning_scar.core.restoration import load
from lightning_scar.storage.delta import Delta
from lightning_scar.storage.host_memory import VARIABLE
from lightning_scar.storage.store import DeltaStore

pytestmark = pytest.mark.usefixtures("host")


# -- copies on other hosts ---------------------------------------------------------------------------------------------


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
    # There is no group any more to wait in.
    (Path(url).parent / f"done-{rank}").touch()
    while not all((Path(url).parent / f"done-{other}").exists() for other in (0, 2)):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_chain_is_repaired_around_a_dead_member(url: str, host: Path) -> None:
    hosts = hosts_of(host, 3)
    failures = run_ranks(with_a_tail_that_dies, 3, hosts, url, failing=True)
    assert [failure.message for failure in failures] == ["ended with -9 and without a result"] * 3, failures
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


def without_room_for_copies(rank: int, hosts: list[Path], url: str) -> tuple[int, list[str]]:
    os.environ[VARIABLE] = str(hosts[rank])
    training = make_training()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        limit = 10_000 if rank == 1 else None
        with opened(url, fraction=1.0, memory_limit=limit, **MEMORY) as running:
            for _ in range(10):
                training.step()
                training.save(running)
                running.flush()
            running.ranks.gather(None)
        return running.stats.unreplicated_saves, [str(warning.message) for warning in caught]


def test_copies_that_find_no_room_are_counted_and_warned_of_once(url: str, host: Path) -> None:
    hosts = hosts_of(host, 2)
    behind, said = run_ranks(without_room_for_copies, 2, hosts, url)[0]
    assert behind == 10
    assert len([text for text in said if "lag" in text and "saves behind" in text]) == 1
    assert_same(load(url), state_at(10))
    assert not left_behind(hosts)


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
