"""The benchmarks of failures run, and what they make of the workers' lines is right (tiny, so no figure counts)."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import prepared
import pytest

from benchmarks import continuation, outage_picture, outage_steps, soak, timeline
from benchmarks.curve import Curve
from benchmarks.step_log import Kill, Line, StepLog, mistakes, read, recovery, redone
from lightning_scar.elastic.supervisor.folder import MemoryFolder

RUNS = {
    "overhead": ["--quick", "--rounds", "3", "--steps", "5", "--torchft", "no"],
    "outage": ["--quick", "--rounds", "1", "--methods", "cover,backup"],
    "outage_steps": ["--quick", "--methods", "cover"],
    "outage_picture": ["--modes", "cover", "--startup", "1.5"],
    "soak": ["--seconds", "3", "--ranks", "2", "--every", "1", "--epoch-steps", "0"],
    "continuation": ["--quick", "--ways", "none,cover", "--seconds", "3", "--kill-at", "1"],
}
PROMISED = {
    "overhead": ["tiny_ratio", "tiny_mean_ratio", "tiny_floor_ratio", "tiny_own_us"],
    "outage": [
        *("startup_s", "cover_survivors_s", "cover_rejoined_s", "cover_redone", "cover_hung"),
        *("backup_survivors_s", "backup_rejoined_s", "backup_redone", "backup_hung"),
    ],
    "outage_steps": ["pause_3_cover_wall_ratio", "pause_3_cover_cpu_ratio"],
    "outage_picture": ["cover_rejoined_s"],
    "soak": ["seconds", "steps", "wrong"],
    "continuation": ["none_last_step", "cover_last_step", "cover_off"],
}

LONG = ("outage", "overhead", "outage_steps", "outage_picture", "soak", "continuation")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in RUNS]
)
def test_a_benchmark_of_failures_measures_what_is_promised(name: str, tmp_path: Path) -> None:
    out, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    plot = ["--plot", str(picture)] if name in ("continuation", "outage_picture") else []
    run = prepared.run(
        [sys.executable, "-m", f"benchmarks.{name}", *RUNS[name], *plot, "--json", str(out), "--dir", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    figures: dict[str, Any] = json.loads(out.read_text())
    for key in PROMISED[name]:
        assert math.isfinite(figures[key]), key
    if plot:
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    if name == "continuation":
        assert figures["cover_off"] < 1e-4
    if name == "outage":
        for way in ("cover", "backup"):
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


def test_two_runs_are_compared_after_equal_numbers_of_steps() -> None:
    calm = Curve([1.0, 2.0, 3.0], [5, 10, 15], [0.9, 0.5, 0.4], outage=None, printed=[])
    again = Curve([1.0, 2.0, 7.0, 8.0], [5, 10, 10, 20], [0.9, 0.7, 0.53, 0.1], outage=5.0, printed=[])
    assert continuation.off(again, calm) == pytest.approx(0.03)


def test_steps_before_a_kill_and_until_the_replacement_joins_are_measured() -> None:
    def own(step: int, when: float, cpu: float) -> Line:
        return Line(when, 0, step, 10, cpu=cpu)

    before = [own(step, 2.0 * step, 1.0 * step) for step in range(1, 9)]
    during = [own(step, 20.0 + 3.0 * (step - 9), 8.0 + 1.5 * (step - 9)) for step in range(9, 15)]
    after = [own(step, 100.0 + step, 50.0 + step) for step in range(15, 19)]
    joined = [Line(99.0, 1, step, 12) for step in (14, 15)]
    wall, cpu = outage_steps.step_times(sorted([*before, *during, *after, *joined]), Kill(17.0, 1, 11), pid=10)
    assert (wall, cpu) == ((2.0, 3.0), (1.0, 1.5))


def test_what_a_worker_notes_is_read_as_spans_of_time(tmp_path: Path) -> None:
    (tmp_path / "timeline-0-10").write_text("1.0 born\n")  # the supervisor
    text = "1.5 born\n2.0 ready\n2.5 own\n3.0 done\n3.5 alone\n3.7 done\n3.8 own\n9"
    (tmp_path / "timeline-1-11").write_text(text)
    assert [span[:2] + span[4:] for span in timeline.read(tmp_path)] == [
        (1.5, 2.0, "start"),
        (2.5, 3.0, "own"),
        (3.5, 3.7, "alone"),
        (3.8, float("inf"), "own"),
    ]


def test_the_picture_tells_a_check_from_a_covered_batch() -> None:
    def spans(pid: int, rank: int, *those: tuple[float, str]) -> list[timeline.Span]:
        return [timeline.Span(began, began + 0.5, rank, pid, what) for began, what in those]

    first = [(1.0, "own"), (2.0, "own"), (3.0, "alone"), (4.0, "alone"), (5.0, "alone"), (6.0, "own")]
    survivor = spans(10, 0, *first, (8.0, "alone"), (9.0, "own"))
    victim, replacement = spans(11, 1, (1.0, "own")), spans(12, 1, (7.0, "alone"), (10.0, "own"))
    lines = [Line(0.5, 0, 1, 10), Line(0.5, 1, 1, 11), Line(7.0, 0, 2, 10), Line(9.8, 0, 3, 10), Line(11.0, 1, 4, 12)]
    found = outage_picture.lived("cover", sorted([*survivor, *victim, *replacement]), lines, Kill(1.2, 1, 11))
    kinds = ["own", "check", "check", "check", "cover", "own", "cover", "own"]
    assert [span.what for span in found.spans if span.pid == 10] == kinds
    assert [span.what for span in found.spans if span.pid == 12] == ["start", "own"]
    assert [span.ended for span in found.spans if span.pid == 11] == [0.0]


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
