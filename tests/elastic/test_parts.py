"""The parts of the supervisor that need no script."""

import os
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore

from lightning_scar.elastic import host
from lightning_scar.elastic.agent import Layout, heartbeat_key
from lightning_scar.elastic.memory_folder import MemoryFolder
from lightning_scar.elastic.messages import Lost
from lightning_scar.elastic.worker_process import WorkerProcess


def finished(*arguments: str) -> tuple[int, WorkerProcess]:
    worker = WorkerProcess([sys.executable, *arguments], {"GREETING": "hello"})
    deadline = time.monotonic() + 30
    while (code := worker.poll()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert code is not None
    return code, worker


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
    worker = WorkerProcess(["no-such-program"], {})
    while worker.poll() is None:
        time.sleep(0.01)
    assert worker.poll() == 1
    assert "cannot run no-such-program" in capfd.readouterr().err


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


def test_a_node_that_falls_silent_is_lost_once() -> None:
    store = HashStore()
    watch = host._Watch(store, Layout(node=0, nodes=3, per_node=2))
    now = time.monotonic()
    store.add(heartbeat_key(1), 1)
    assert watch.lost(now + 2) == []
    assert watch.lost(now + 40) == [Lost(1, (2, 3))]
    assert watch.lost(now + 80) == []
    assert watch.lost(now + 700) == [Lost(2, (4, 5))]
