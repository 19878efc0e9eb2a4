"""The parts of the supervisor that need no script."""

import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from elastic_helpers import assert_gone, code_of
from torch.distributed import HashStore

from lightning_scar.elastic.prepared.starter import Starter
from lightning_scar.elastic.supervisor import process as worker_process
from lightning_scar.elastic.supervisor.folder import MemoryFolder
from lightning_scar.elastic.supervisor.process import WorkerProcess
from lightning_scar.elastic.worker.epochs import Epochs
from lightning_scar.elastic.worker.state_folder import DISK


def started(*command: str) -> WorkerProcess:
    return WorkerProcess(
        partial(Starter(command, {"GREETING": "hello"}, Path("none"), print, prepared=False).start, {})
    )


def finished(*arguments: str) -> tuple[int, WorkerProcess]:
    worker = started(sys.executable, *arguments)
    return code_of(worker), worker


def test_standard_error_is_passed_on_byte_by_byte(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    blob = bytes(range(256)) * 1000
    code, _ = finished("-c", "import sys; sys.stderr.buffer.write(bytes(range(256)) * 1000); sys.exit(4)")
    assert code == 4
    assert capfdbinary.readouterr().err == blob + b"\n"


def test_the_tail_holds_the_last_lines(capfd: pytest.CaptureFixture[str]) -> None:
    _, worker = finished("-c", "import sys; [print(i, file=sys.stderr) for i in range(1000)]")
    lines = worker.tail().split()
    assert lines[-1] == "999"
    assert len(lines) == 30
    capfd.readouterr()


def test_a_worker_killed_in_mid_sentence_is_heard_to_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    code, worker = finished("-c", "import os; os.write(2, b'the ' + os.environb[b'GREETING']); os.kill(os.getpid(), 9)")
    assert code == -9
    assert worker.tail().strip() == "the hello"
    capfd.readouterr()


def test_a_command_that_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    assert code_of(started("no-such-program")) == 1
    assert "cannot run no-such-program" in capfd.readouterr().err


def orphan(child: str, is_apart: bool = False) -> WorkerProcess:
    """A worker that is gone and unnoticed yet; what it started is still there, perhaps in a session of its own."""
    start = f"subprocess.Popen([{child}], start_new_session={is_apart})"
    text = f"import subprocess, sys; sys.stderr.write(str({start}.pid))"
    worker = started(sys.executable, "-c", text)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    return worker


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_a_dead_worker_does_not_hide_its_death(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    worker = orphan("'sleep', '60'")
    worker.send(number)
    assert code_of(worker) == 0
    assert_gone(worker.tail())
    capfd.readouterr()


def test_who_holds_a_dead_workers_standard_error_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker_process, "_LAST_WORDS_SECONDS", 2.0)
    worker = orphan("'sh', '-c', 'while sleep 0.02; do echo tick >&2; done'", is_apart=True)
    longest, code = 0.0, None
    while code is None:
        before = time.monotonic()
        code = worker.poll()
        longest = max(longest, time.monotonic() - before)
        time.sleep(0.01)
    assert code == 0
    assert longest < 1.5
    os.killpg(int(capfd.readouterr().err.partition("tick")[0]), signal.SIGKILL)


def test_folders_of_owners_that_are_gone_are_removed(tmp_path: Path) -> None:
    held = MemoryFolder(tmp_path)
    left, other = tmp_path / "lightning-scar-dead", tmp_path / "somebody-else"
    for folder in (held.path, left, other):
        folder.mkdir(exist_ok=True)
        (folder / "state").write_text("state")
        os.utime(folder, (0, 0))
    fresh = MemoryFolder(tmp_path)
    assert not left.exists()
    assert held.path.exists()
    assert other.exists()
    fresh.close()
    held.close()
    assert os.listdir(tmp_path) == ["somebody-else"]


def test_in_the_folder_in_memory_a_link_leads_to_one_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    (disk / "lightning-scar-dead").mkdir()
    folder = MemoryFolder(memory)
    (folder.path / DISK / "state").write_text("state")
    [on_disk] = disk.iterdir()
    assert (folder.path.parent, on_disk / "state") == (memory, (folder.path / DISK).resolve() / "state")
    MemoryFolder(memory).close()
    assert (on_disk / "state").exists()
    folder.close()
    assert [*memory.iterdir(), *disk.iterdir()] == []


def test_who_was_left_behind_knows_it_whatever_it_does_until_it_looks() -> None:
    """Its thread wakes it, and it may come to the end of its epoch before it meets the shut connection."""
    store = HashStore()
    first, second = Epochs(0, lambda: 0), Epochs(1, lambda: 0)
    first.end(store, step=6, times=1)
    second.goes_on_after = (6, 0)
    assert second.left_behind_by(store) == (0, 6)
    second.goes_on_after = None
    second.end(store, step=9, times=1)
    second.goes_on_after = (9, 1)
    assert second.left_behind_by(store) == (0, 6)


def test_owners_that_come_and_go_at_the_same_time_leave_each_others_folders_alone(tmp_path: Path) -> None:
    def come_and_go(_: int) -> None:
        for _ in range(100):
            folder = MemoryFolder(tmp_path)
            (folder.path / "state").write_text("state")
            folder.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(come_and_go, range(8)))
    assert not os.listdir(tmp_path)
