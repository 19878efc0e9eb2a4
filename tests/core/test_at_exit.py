"""Programs that end without closing their running checkpoint."""

import subprocess
import sys
from pathlib import Path

import prepared
import pytest
from core_helpers import assert_same
from memory_helpers import MEMORY, folders, state_at, stored
from shared_helpers import make_training, opened, quietly

pytestmark = pytest.mark.usefixtures("host")

PROGRAM = """
import os, sys
sys.path[:0] = sys.argv[1:3]
from shared_helpers import make_training, opened
running, training = opened(sys.argv[3], fraction=1.0, memory=True, durable_every_n_saves=4), make_training()
for _ in range(6):
    training.step()
    training.save(running)
"""
WAYS = {
    "the end": "",
    "sys.exit": "sys.exit(3)",
    "an exception": "raise RuntimeError('a crash')",
    "forgotten": "del running, training",
}


def run(url: str, end: str) -> int:
    tests = Path(__file__).parents[1]
    arguments = [sys.executable, "-c", PROGRAM + end, str(tests), str(tests / "core"), url]
    # One of them is a real interpreter, whose end it is; forks end in the same order.
    start = prepared.run if end else subprocess.run
    return start(arguments, timeout=90, stderr=subprocess.DEVNULL).returncode


@pytest.mark.parametrize(("way", "code"), zip(WAYS, [0, 3, 1, 0], strict=True))
def test_what_memory_alone_has_is_brought_to_storage(way: str, code: int, url: str, host: Path) -> None:
    assert run(url, WAYS[way]) == code
    assert stored(url) == 6
    with opened(url, fraction=1.0, **MEMORY) as running:
        assert_same(quietly(running)[0], state_at(6))
        make_training().save(running)
    assert not folders(host)


def test_a_forked_child_that_ends_brings_nothing_anywhere(url: str) -> None:
    assert run(url, "pid = os.fork()\nif pid: os.waitpid(pid, 0); os._exit(5)") == 5
    assert stored(url) == 4


def test_storage_that_fails_then_leaves_it_to_the_next_start(url: str, host: Path) -> None:
    end = "os.rename(sys.argv[3] + '/rank-0000', sys.argv[3] + '/aside'); open(sys.argv[3] + '/rank-0000', 'w').close()"
    assert run(url, end) == 0
    (Path(url) / "rank-0000").unlink()
    (Path(url) / "aside").rename(Path(url) / "rank-0000")
    assert stored(url) == 4
    with opened(url, fraction=1.0, **MEMORY) as running:
        assert_same(quietly(running)[0], state_at(6))


def test_a_closed_one_is_left_alone(url: str) -> None:
    assert run(url, "running.close()\nimport shutil; shutil.rmtree(sys.argv[3])") == 0
    assert not Path(url).exists()
