"""One live run a directory."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import prepared
import psutil
import pytest
from toy_blocks import Spawn

from lightning_scar.storage import lease as lease_module
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.lease import FILE, DirectoryInUseError, Lease


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 5.0)


@pytest.fixture
def acquire() -> Iterator[Callable[[str], Lease]]:
    """Takes a directory, and gives it back at the end."""
    taken: list[Lease] = []

    def take(url: str) -> Lease:
        lease = Lease(Directory(url))
        lease.acquire()
        taken.append(lease)
        return lease

    yield take
    for lease in taken:
        lease.release()


Acquire = Callable[[str], Lease]


def contents(url: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Directory(url).read(FILE))
    return found


def give_to_another_host(url: str) -> None:
    Directory(url).write(FILE, [json.dumps({**contents(url), "token": "0", "host": "another-host"}).encode()])


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def own(url: str, host: str, pipe: Connection) -> None:
    """Owns a directory from a host of that name, and reports whether it has lost it."""
    lease_module.BEAT_SECONDS = 0.05
    socket.gethostname = lambda: host
    lease = Lease(Directory(url))
    lease.acquire()
    pipe.send("acquired")
    wait_for(lambda: lease.lost)
    lease.release()
    pipe.send("lost")


def start_holder(spawn: Spawn, url: str, host: str) -> tuple[BaseProcess, Connection]:
    ours, theirs = Pipe(duplex=False)
    process = spawn(own, url, host, theirs)
    theirs.close()
    assert ours.recv() == "acquired"
    return process, ours


def test_a_free_directory_is_taken_and_given_back(url: str, acquire: Acquire) -> None:
    lease = acquire(url)
    assert Directory(url).names() == [FILE]
    assert contents(url)["pid"] == os.getpid()
    assert contents(url)["host"] == socket.gethostname()
    lease.release()
    assert Directory(url).names() == []
    lease.release()


def test_a_second_run_in_the_same_process_is_refused_until_the_first_gives_back(url: str, acquire: Acquire) -> None:
    first = acquire(url)
    with pytest.raises(DirectoryInUseError):
        acquire(url)
    first.release()
    acquire(url)


def test_of_several_that_begin_at_the_same_moment_one_gets_it(file_url: str) -> None:
    for _ in range(20):
        leases = [Lease(Directory(file_url)) for _ in range(4)]
        start = threading.Barrier(4)

        def took(lease: Lease, start: threading.Barrier = start) -> bool:
            start.wait()
            with suppress(DirectoryInUseError):
                lease.acquire()
                return True
            return False

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(took, leases)) == 1
        for lease in leases:
            lease.release()


def test_who_begins_at_the_same_moment_on_another_host_is_met_at_once(
    url: str, acquire: Acquire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 60.0)
    lease = acquire(url)
    give_to_another_host(url)
    wait_for(lambda: lease.lost)


def test_who_was_taken_over_and_has_not_noticed_leaves_the_new_holders_file(
    url: str, acquire: Acquire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 60.0)
    monkeypatch.setattr(lease_module, "_FIRST_BEAT_SECONDS", 60.0)
    lease = acquire(url)
    give_to_another_host(url)
    lease.release()
    assert contents(url)["token"] == "0"


def test_a_clock_that_is_set_makes_nobody_dead(
    file_url: str, spawn: Spawn, acquire: Acquire, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_holder(spawn, file_url, socket.gethostname())
    create_time = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: create_time(process) + 3600)
    with pytest.raises(DirectoryInUseError):
        acquire(file_url)


def test_two_directories_may_be_owned_at_once(url: str, acquire: Acquire) -> None:
    acquire(f"{url}/a")
    acquire(f"{url}/b")


def test_the_beat_goes_on_while_the_holder_lives(url: str, acquire: Acquire) -> None:
    acquire(url)
    beat = contents(url)["beat"]
    wait_for(lambda: contents(url)["beat"] > beat + 1)


def test_a_second_live_process_is_refused_with_a_remedy(shared_url: str, spawn: Spawn, acquire: Acquire) -> None:
    process, _ = start_holder(spawn, shared_url, socket.gethostname())
    with pytest.raises(
        DirectoryInUseError, match=rf"in use by process {process.pid} on .*Give this run another dirpath"
    ):
        acquire(shared_url)
    assert contents(shared_url)["pid"] == process.pid


def test_a_killed_holder_is_taken_over_at_once(
    shared_url: str, spawn: Spawn, acquire: Acquire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 60.0)
    process, _ = start_holder(spawn, shared_url, socket.gethostname())
    process.kill()
    process.join()
    assert contents(shared_url)["pid"] == process.pid
    started = time.monotonic()
    lease = acquire(shared_url)
    assert time.monotonic() - started < 20
    assert contents(shared_url)["pid"] == os.getpid()
    assert not lease.lost


def test_a_killed_holder_that_nobody_waited_for_is_taken_over_at_once(file_url: str, acquire: Acquire) -> None:
    program = f"""
import time
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.lease import Lease
Lease(Directory({file_url!r})).acquire()
print("acquired", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"acquired\n"
        with pytest.raises(DirectoryInUseError):
            acquire(file_url)
        process.send_signal(signal.SIGKILL)
        wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
        acquire(file_url)


def test_what_a_holder_killed_in_a_beat_has_written_of_it_is_removed(file_url: str, acquire: Acquire) -> None:
    program = f"""
import os, signal
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.lease import Lease
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
Lease(Directory({file_url!r})).acquire()
"""
    assert prepared.run([sys.executable, "-c", program], timeout=60).returncode == -signal.SIGKILL
    folder = Path(file_url)
    assert list(folder.glob(".*.tmp"))
    acquire(file_url)
    assert [path.name for path in folder.iterdir()] == [FILE]


def test_a_process_that_got_a_dead_holders_number_does_not_pass_for_it(
    file_url: str, spawn: Spawn, acquire: Acquire
) -> None:
    process, _ = start_holder(spawn, file_url, socket.gethostname())
    holder = contents(file_url)
    process.kill()
    process.join()
    Directory(file_url).write(FILE, [json.dumps({**holder, "pid": os.getppid()}).encode()])
    acquire(file_url)


def test_this_process_under_a_dead_runs_number_is_not_that_run(file_url: str, acquire: Acquire) -> None:
    acquire(file_url).release()
    holder = {"token": "0", "host": socket.gethostname(), "pid": os.getpid(), "started": "0", "beat": 3}
    Directory(file_url).write(FILE, [json.dumps(holder).encode()])
    acquire(file_url)


def test_a_holder_on_another_host_whose_beat_goes_on_is_not_disturbed(
    shared_url: str, spawn: Spawn, acquire: Acquire
) -> None:
    process, pipe = start_holder(spawn, shared_url, "another-host")
    with pytest.raises(DirectoryInUseError, match=f"in use by process {process.pid} on another-host"):
        acquire(shared_url)
    assert not pipe.poll()


def test_a_holder_on_another_host_whose_beat_stands_still_is_taken_over_and_notices(
    shared_url: str, spawn: Spawn, acquire: Acquire
) -> None:
    process, pipe = start_holder(spawn, shared_url, "another-host")
    os.kill(process.pid or 0, signal.SIGSTOP)
    lease = acquire(shared_url)
    os.kill(process.pid or 0, signal.SIGCONT)
    assert pipe.recv() == "lost"
    assert contents(shared_url)["pid"] == os.getpid(), "who lost the directory must not delete the new holder's file"
    assert not lease.lost


def test_a_holder_on_another_host_that_gives_back_is_followed_at_once(
    file_url: str, acquire: Acquire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 60.0)
    holder = {"token": "0", "host": "another-host", "pid": 1, "started": "0", "beat": 3}
    folder = Directory(file_url)
    folder.create()
    folder.write(FILE, [json.dumps(holder).encode()])
    remover = subprocess.Popen(["sh", "-c", f"sleep 0.3; rm {folder.file(FILE)}"])
    started = time.monotonic()
    acquire(file_url)
    assert time.monotonic() - started < 20
    remover.wait()


def test_a_holder_on_another_host_that_ends_while_it_is_watched_is_followed_at_once(
    file_url: str, acquire: Acquire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 60.0)
    holder = {"token": "0", "host": "another-host", "pid": 1, "started": "0", "beat": 3, "unstored": True}
    folder = Directory(file_url)
    folder.create()
    folder.write(FILE, [json.dumps(holder).encode()])
    ended = json.dumps({**holder, "released": True, "unstored": False}).encode()
    end = threading.Timer(0.3, lambda: folder.write(FILE, [ended]))
    end.start()
    assert not acquire(file_url).left_unstored
    end.join()


def test_a_folder_that_the_user_has_locked_is_taken(file_url: str, acquire: Acquire) -> None:
    """As by ``flock DIR python train.py``."""
    Directory(file_url).create()
    with subprocess.Popen(["flock", file_url, "sh", "-c", "echo locked; read _"], **PIPES) as flock:
        assert flock.stdout is not None
        assert flock.stdout.readline() == b"locked\n"
        assert acquire(file_url)
        flock.communicate(b"\n")


PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


def test_a_holder_file_that_holds_nonsense_is_nobodys(url: str, acquire: Acquire) -> None:
    Directory(url).create()
    Directory(url).write(FILE, [b"nonsense"])
    acquire(url)


def test_a_directory_that_cannot_be_made_raises(file_url: str) -> None:
    Path(file_url).write_bytes(b"a file")
    with pytest.raises(OSError, match="store"):
        Lease(Directory(file_url)).acquire()


def test_the_beat_returns_when_the_owners_file_was_lost(file_url: str, acquire: Acquire) -> None:
    lease = acquire(file_url)
    Path(file_url, FILE).unlink()
    wait_for(Path(file_url, FILE).exists)
    assert not lease.lost


def test_the_beat_goes_on_when_a_disk_that_was_away_is_back(file_url: str, acquire: Acquire) -> None:
    lease = acquire(file_url)
    os.rename(file_url, f"{file_url}-away")
    time.sleep(0.3)
    os.rename(f"{file_url}-away", file_url)
    beat = contents(file_url)["beat"]
    wait_for(lambda: contents(file_url)["beat"] > beat)
    assert not lease.lost
