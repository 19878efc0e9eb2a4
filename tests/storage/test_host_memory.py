"""The folders in a host's memory: whose they are, and that they come and go while others do."""

import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from toy_blocks import meanwhile

from lightning_scar.storage.directory import Directory
from lightning_scar.storage.host_memory import HostMemory, left_in_memory


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    return Directory(tmp_path / "scar")


def test_starts_come_and_go_at_the_same_time(host: Path, directory: Directory) -> None:
    def come_and_go(_: int) -> None:
        for _ in range(100):
            memory = HostMemory(directory, uuid.uuid4().hex)
            (memory.folder / "rank-0000").mkdir()
            memory.leave()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(come_and_go, range(8)))
    assert not list(host.glob("*/*/*"))


def test_folders_of_other_runs_come_and_go_while_a_start_looks_through_them(host: Path, directory: Directory) -> None:
    held = HostMemory(directory, "held")

    def come_and_go() -> None:
        for name in "abcdefgh":
            run = held.folder.parents[1] / name
            run.mkdir()
            # The start may have removed it already.
            with suppress(FileNotFoundError):
                run.rmdir()

    with meanwhile(come_and_go):
        for _ in range(200):
            HostMemory(directory, uuid.uuid4().hex).leave()


def test_ranks_of_one_start_that_come_while_others_end_hold_their_folder(host: Path, directory: Directory) -> None:
    def come_and_go(rank: int) -> None:
        for _ in range(100):
            memory = HostMemory(directory, "the same")
            assert memory.folder.stat().st_ino == os.fstat(memory._lock).st_ino
            (memory.folder / f"rank-{rank:04d}").mkdir()
            memory.leave()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(come_and_go, range(8)))
    assert not list(host.glob("*/*"))


def test_a_start_that_wrote_nothing_leaves_nothing(host: Path, directory: Directory) -> None:
    HostMemory(directory, "a").leave()
    assert not list(host.glob("*/*"))


def test_a_folder_that_was_removed_is_made_and_held_again(host: Path, directory: Directory) -> None:
    memory = HostMemory(directory, "a")
    memory.renew()
    memory.folder.rmdir()
    memory.folder.parent.rmdir()
    memory.renew()
    assert memory.folder.stat().st_mode & 0o777 == 0o700
    HostMemory(directory, "b")
    assert memory.folder.exists(), "it is held"
    memory.leave()
    (memory.folder / "rank-0000").mkdir(parents=True)
    HostMemory(directory, "c")
    assert not memory.folder.exists(), "it is not"


def test_what_is_not_the_users_alone_any_more_is_not_renewed(host: Path, directory: Directory) -> None:
    memory = HostMemory(directory, "a")
    memory.folder.rmdir()
    memory.folder.parents[1].chmod(0o755)
    with pytest.raises(PermissionError, match="no longer this user's alone"):
        memory.renew()


def test_a_folder_is_found_by_its_directory_and_its_run(host: Path, directory: Directory) -> None:
    held = HostMemory(directory, "a")
    assert left_in_memory(directory, "a") == held.folder
    assert held.folder.parents[1] == host / f"scar-memory-{os.getuid()}"
    assert left_in_memory(directory, "b") is None
    assert left_in_memory(directory, None) is None, "there is no lease"
    assert left_in_memory(Directory(f"{directory}-2"), "a") is None


@pytest.mark.parametrize("run", ["../../precious", "/precious", "..", "", "a/b", "a\0b"])
def test_what_a_strangers_lease_calls_its_run_leads_nowhere_else(run: str, host: Path, directory: Directory) -> None:
    """Whoever shares a directory can write its lease."""
    (host / "precious").mkdir(mode=0o700)
    memory = HostMemory(directory, run)
    assert memory.folder.parents[1] == host / f"scar-memory-{os.getuid()}"
    memory.leave()
    assert (host / "precious").exists()
