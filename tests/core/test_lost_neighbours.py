"""Hosts whose memory cannot be read in a recovery: the next tier serves, for all ranks the same, and it is said."""

import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from core_helpers import assert_same
from memory_helpers import (
    MEMORY,
    heal,
    hosts_of,
    kill_on_hosts,
    left_behind,
    state_at,
    steps_of,
    train_and_spoil,
    wait_for_copies,
)
from ranks import run_ranks
from shared_helpers import copied, make_training, opened

from lightning_scar.core.reader import Reader
from lightning_scar.core.restoration import load
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.storage.folder_client import FolderClient
from lightning_scar.storage.host_memory import VARIABLE

Trouble = Callable[[RunningCheckpoint], None]
Found = tuple[dict[str, Any], str, list[str]]

pytestmark = pytest.mark.usefixtures("host")


def serves_nobody(running: RunningCheckpoint) -> None:
    """The server ends between the offer and the reading."""
    neighbours = running._neighbours
    serve = neighbours._serve

    def ended() -> tuple[str, int]:
        address = serve()
        assert neighbours._server is not None
        neighbours._server.close()
        return address

    neighbours._serve = ended  # type: ignore[method-assign]


def cannot_serve(running: RunningCheckpoint) -> None:
    """There is no port for a server."""
    running._neighbours._address = "192.0.2.1"


def is_cut_off(*_: Any) -> int:
    raise ConnectionError("the cable was pulled")


def cannot_read_skeletons(running: RunningCheckpoint) -> None:
    """This rank's connections are lost when it has read what files there are."""
    reach = running._neighbours._reach

    def reached() -> dict[int, str]:
        lost = reach()
        FolderClient.read_into = is_cut_off  # type: ignore[method-assign]
        return lost

    running._neighbours._reach = reached  # type: ignore[method-assign]


def cannot_read_blocks(running: RunningCheckpoint) -> None:
    """This rank's connections are lost when it begins to read blocks."""
    read = Reader.read

    def cut_off(reader: Reader) -> None:
        FolderClient.read_into = is_cut_off  # type: ignore[method-assign]
        read(reader)

    Reader.read = cut_off  # type: ignore[method-assign]


def restored(rank: int, hosts: list[Path], url: str, trouble: Trouble, troubled: int, **options: Any) -> Found:
    """Resumes while one rank has some trouble, and saves once."""
    os.environ[VARIABLE] = str(hosts[rank])
    training = make_training()
    with warnings.catch_warnings(record=True) as caught, opened(url, fraction=1.0, **MEMORY, **options) as running:
        warnings.simplefilter("always")
        if rank == troubled:
            trouble(running)
        training.load(running.restore().checkpoint)
        found = copied(training)
        training.step()
        training.save(running)
        said = [str(warning.message) for warning in caught if "lightning-scar" in str(warning.message)]
        return found, running.recovery, said


@pytest.mark.parametrize("trouble", [serves_nobody, cannot_serve])
def test_a_host_that_cannot_be_reached_falls_through_to_storage_and_it_is_said_once(
    trouble: Trouble, url: str, host: Path
) -> None:
    hosts = hosts_of(host, 2)
    kill_on_hosts(hosts, url, 6, replicas=0)
    (first, recovery, said), (second, _, more) = run_ranks(restored, 2, hosts, url, trouble, 1, replicas=0)
    assert_same(second, first)
    assert set(steps_of(first, 4, 6)) == {4, 6}, "the other host's memory serves still"
    assert "from this host's memory" in recovery
    assert "from newest versions" in recovery
    assert len([text for text in said if "the memory of 1 host cannot be read (that of rank 1:" in text]) == 1, said
    assert not more
    assert load(url)["global_step"] == 7
    assert not left_behind(hosts)


def test_two_neighbours_lost_at_once_fall_through_to_storage(url: str, host: Path) -> None:
    hosts = hosts_of(host, 3)
    kill_on_hosts(hosts, url, 6)
    results = run_ranks(restored_without_servers, 3, hosts, url)
    for found, _, _ in results:
        assert_same(found, results[0][0])
    assert set(steps_of(results[0][0], 4, 6)) == {4, 6}
    assert "from a neighbour's memory" not in results[0][1]
    assert sum("the memory of 2 hosts cannot be read" in text for _, _, said in results for text in said) == 1


def restored_without_servers(rank: int, hosts: list[Path], url: str) -> Found:
    return restored(rank, hosts, url, serves_nobody, rank or -1)


def test_a_copy_serves_for_a_host_that_cannot_be_reached(url: str, host: Path) -> None:
    hosts = hosts_of(host, 3)
    kill_on_hosts(hosts, url, 6)
    for found, recovery, _ in run_ranks(restored, 3, hosts, url, serves_nobody, 1):
        assert_same(found, state_at(6))
        assert "newest versions" not in recovery


@pytest.mark.parametrize("trouble", [cannot_read_skeletons, cannot_read_blocks])
def test_connections_that_are_lost_in_the_middle(trouble: Trouble, url: str, host: Path) -> None:
    hosts = hosts_of(host, 3)
    kill_on_hosts(hosts, url, 6, replicas=0)
    # Each rank is on another host than before, so that it has to read its share from there.
    results = run_ranks(restored, 3, [*hosts[1:], hosts[0]], url, trouble, 1, replicas=0)
    for found, _, _ in results:
        assert_same(found, results[0][0])
    assert set(steps_of(results[0][0], 4, 6)) == {4, 6}
    assert sum("the cable was pulled" in text for _, _, said in results for text in said) == 1
    assert not any(said for _, _, said in results[1:])
    assert load(url)["global_step"] == 7
    assert not left_behind(hosts)


def heals(rank: int, hosts: list[Path], url: str) -> tuple[dict[str, Any], str, list[str]]:
    os.environ[VARIABLE] = str(hosts[rank])
    training = make_training()
    with warnings.catch_warnings(record=True) as caught, opened(url, fraction=1.0, replicas=0, **MEMORY) as running:
        warnings.simplefilter("always")
        train_and_spoil(training, running, 6)
        if rank == 1:
            serves_nobody(running)
        plan = heal(training, running)
        return copied(training), plan, [str(warning.message) for warning in caught]


def test_healing_goes_on_without_a_host_that_cannot_be_reached(url: str, host: Path) -> None:
    (first, plan, said), (second, _, _) = run_ranks(heals, 2, hosts_of(host, 2), url)
    assert_same(second, first)
    assert set(steps_of(first, 4, 6)) == {4, 6}
    assert "newest versions" in plan
    assert len([text for text in said if "cannot be read (that of rank 1:" in text]) == 1


def listening(running: RunningCheckpoint) -> bool:
    return running._neighbours._server is not None


def served(rank: int, hosts: list[Path], url: str, replicas: int) -> tuple[bool, bool]:
    os.environ[VARIABLE] = str(hosts[rank])
    with opened(url, fraction=1.0, replicas=replicas, **MEMORY) as running:
        before = listening(running)
        running.restore()
        running.ranks.gather(None)
        return before, listening(running)


def test_a_server_that_only_a_recovery_needs_ends_with_it(url: str, host: Path) -> None:
    hosts = hosts_of(host, 2)
    kill_on_hosts(hosts, url, 6, replicas=0)
    assert run_ranks(served, 2, hosts, url, 0) == [(False, False)] * 2
    kill_on_hosts(hosts, url, 6)
    assert run_ranks(served, 2, hosts, url, 1) == [(True, True)] * 2


def test_copies_may_have_been_merged_later_than_what_they_are_copies_of(url: str, host: Path) -> None:
    hosts = hosts_of(host, 2)
    kill_on_hosts(hosts, url, 6)
    # The same blocks in a file of another name, as if one host had been killed before the other merged it.
    copy = max(hosts[1].glob("*/*/*/rank-0000/*"), key=lambda path: path.name)
    copy.rename(copy.with_name(copy.name.replace("delta", "merged")))
    for found, _, _ in run_ranks(restored, 2, hosts, url, nothing_happens, 1):
        assert_same(found, state_at(6))


def nothing_happens(running: RunningCheckpoint) -> None:
    pass


def removes_copies(rank: int, hosts: list[Path], url: str) -> None:
    os.environ[VARIABLE] = str(hosts[rank])
    training = make_training()
    running = opened(url, fraction=0.3, **MEMORY)
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
    there, here = (list(place.glob("*/*/*/rank-0000/*")) for place in (hosts[1], hosts[0]))
    assert {path.name for path in there} == {path.name for path in here}
    assert there
