"""The benchmarks of failures run, and what they make of the workers' lines is right (tiny, so no figure counts)."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import prepared
import pytest

from benchmarks import soak
from benchmarks.curve import Curve
from benchmarks.step_log import Kill, Line, StepLog, mistakes, read, recovery, redone
from lightning_scar.elastic.supervisor.folder import MemoryFolder

RUNS = {
    "overhead": ["--quick", "--rounds", "3", "--steps", "5", "--torchft", "no"],
    "outage": ["--quick", "--rounds", "1", "--methods", "shrink,backup"],
    "soak": ["--seconds", "3", "--ranks", "2", "--every", "1", "--epoch-steps", "0"],
    "continuation": ["--quick", "--ways", "none,wait", "--seconds", "3", "--kill-at", "1"],
}
PROMISED = {
    "overhead": ["tiny_ratio", "tiny_mean_ratio", "tiny_floor_ratio", "tiny_own_us"],
    "outage": [
        *("startup_s", "shrink_survivors_s", "shrink_rejoined_s", "shrink_redone", "shrink_hung"),
        *("backup_survivors_s", "backup_rejoined_s", "backup_redone", "backup_hung"),
    ],
    "soak": ["seconds", "steps", "wrong"],
    "continuation": ["none_last_step", "wait_last_step"],
}

LONG = ("overhead", "soak", "continuation")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in RUNS]
)
def test_a_benchmark_of_failures_measures_what_is_promised(name: str, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    run = prepared.run(
        [sys.executable, "-m", f"benchmarks.{name}", *RUNS[name], "--json", str(out), "--dir", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    figures: dict[str, Any] = json.loads(out.read_text())
    for key in PROMISED[name]:
        assert math.isfinite(figures[key]), key
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    if name == "outage":
        for way in ("shrink", "backup"):
            assert (figures[f"{way}_redone"], figures[f"{way}_hung"], figures[f"{way}_kills"]) == (0, 0, 1)


def _steps(rank: int, pid: int, first: int, last: int, began: float = 0.0) -> list[Line]:
    """One step a second."""
    return [Line(began + step - first, rank, step, pid) for step in range(first, last + 1)]


def test_a_recovery_is_read_from_lines() -> None:
    survivor = [*_steps(0, 10, 1, 5), *_steps(0, 10, 6, 12, began=6.5)]
    replaced = [*_steps(1, 11, 1, 5), *_steps(1, 12, 9, 12, began=9.6)]
    found = recovery(sorted(survivor + replaced), Kill(4.6, 1, 11), ranks=2)
    assert found.survivors_s == pytest.approx(6.5 - 4.6)
    assert found.rejoined_s == pytest.approx(10.6 - 4.6)
    assert found.pause_s == pytest.approx(1.0)


def test_a_step_that_began_before_the_kill_does_not_hide_the_outage() -> None:
    survivor = [*_steps(0, 10, 1, 5), *_steps(0, 10, 6, 12, began=9.0)]
    assert recovery(survivor, Kill(3.9, 1, 11), ranks=2).survivors_s == pytest.approx(9.0 - 4.0)


def test_who_does_not_go_on_has_no_figures() -> None:
    found = recovery(_steps(0, 10, 1, 5), Kill(4.6, 1, 11), ranks=2)
    assert (found.survivors_s, found.rejoined_s, found.pause_s) == (None, None, None)


def test_steps_that_are_made_again_are_counted() -> None:
    lines = [*_steps(0, 10, 1, 9), *_steps(0, 11, 6, 9, began=20.0)]
    assert redone(lines) == 4
    assert redone([*_steps(0, 10, 1, 9), Line(20.0, 0, 9, 11, made=False), *_steps(0, 11, 10, 12, began=21.0)]) == 0


def test_mistakes_in_a_training_are_found() -> None:
    right = [*_steps(0, 10, 1, 9), *_steps(1, 11, 1, 4), *_steps(1, 12, 6, 9, began=5.5)]
    assert mistakes(sorted(right), 9, ranks=2) == []
    assert "went from step 3 to step 5" in mistakes([line for line in right if line.step != 4], 9, ranks=2)[0]
    assert "no rank made" in mistakes(sorted(right), 10, ranks=2)[0]
    assert any("last step of rank 2" in mistake for mistake in mistakes(sorted(right), 9, ranks=3))


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    log = StepLog(tmp_path, rank=3)
    log.add(7)
    log.add(8, made=False)
    with next(tmp_path.iterdir()).open("a") as file:
        file.write("12.5 9")  # as if killed in the midst of it
    assert [(line.rank, line.step, line.made) for line in read(tmp_path)] == [(3, 7, True), (3, 8, False)]


def test_a_file_left_in_memory_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "_MEMORY", tmp_path)
    before = soak.in_memory()
    (tmp_path / "left").touch()
    with (tmp_path / "in use").open("w"):
        assert soak.leaked(before) == [tmp_path / "left"]


def test_a_loss_is_that_of_the_last_snapshot() -> None:
    curve = Curve([1.0, 2.0, 3.0], [5, 10, 15], [0.9, 0.5, 0.4], outage=None, printed=[])
    assert [curve.at(when) for when in (0.0, 1.5, 2.0, 9.0)] == [0.9, 0.9, 0.5, 0.4]
    assert curve.reaches(0.5) == 2.0
    assert curve.reaches(0.1) == math.inf


_HOSTS = """
import sys, time
from pathlib import Path
from benchmarks.kills import environment
from benchmarks.lost_hosts import LostHosts
run = LostHosts(["-c", "import time; time.sleep(100)"], Path(sys.argv[1]), environment(), hosts=2)
print(*run._memories, flush=True)
time.sleep(100)
"""


def test_the_memory_of_hosts_whose_benchmark_was_killed_is_removed_by_the_next(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOSTS, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        memories = [Path(path) for path in run.stdout.readline().split()]
        assert all(path.is_dir() for path in memories)
        assert len(memories) == 2
        run.kill()
    MemoryFolder().close()
    assert not any(path.exists() for path in memories)
