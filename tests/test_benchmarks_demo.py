"""What `make demo` makes of the lines that its trainings write."""

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    return importlib.import_module("demo")


def lines(demo: Any, steps: int, saves: dict[int, float], late: int = 0) -> list[Any]:
    """Steps of a second; one behind which a save begins takes longer, and the save is written some steps later."""
    found, clock = [], 0.0
    for step in range(steps + 1):
        clock += 1 + saves.get(step - 1, 0.0)
        begun = sum(step > each for each in saves)
        written = sum(step > each + late for each in saves)
        found.append(demo.Line(step, clock, 10.0 - step, begun, written))
    return found


def test_a_save_costs_what_it_adds_to_the_usual_step(demo: Any) -> None:
    run = demo.Run("any", lines(demo, 50, {20: 3.0, 40: 0.5}, late=3), [])
    assert run.saves == [20, 40]
    assert run.every == 20
    assert run.step_seconds == 1.0
    # The first save does not count where there are others.
    assert run.share == pytest.approx(0.5 / 20)
    assert demo.Run("any", lines(demo, 30, {20: 3.0}), []).share == pytest.approx(3.0 / 20)


def test_rework_is_counted_from_the_restart(demo: Any) -> None:
    before = lines(demo, 6, {2: 0.0})
    after = [before[3]._replace(held_out_loss=loss) for loss in (7.0, 5.5, 4.0, 3.0)]
    assert demo.Run("any", before, after).rework == 2
    assert demo.Run("any", before, after[:2]).rework is None
    assert demo.outcome(demo.Run("any", before, after[:2])) == "the loss was not regained"


@pytest.mark.parametrize(
    ("saves", "step", "expected"),
    [
        ([], 50, False),
        ([20], 50, False),
        ([40], 59, False),
        ([40], 60, True),
        ([20, 40], 49, False),
        ([20, 40], 50, True),
    ],
)
def test_a_training_is_killed_half_way_to_the_next_save(
    demo: Any, saves: list[int], step: int, expected: bool, tmp_path: Path
) -> None:
    training = importlib.import_module("demo_training")
    journal = training.Journal(tmp_path / "journal.csv", training.CountingIO(), kill_from=30, goal=None)
    journal._saves = saves
    assert journal._is_half_way(step, 30) == expected


def test_the_picture_shows_all_of_them(demo: Any, tmp_path: Path) -> None:
    before = lines(demo, 50, {20: 3.0, 40: 0.5})
    runs = [demo.Run(name, before, before[40:]) for name in demo.METHODS]
    demo.plot(runs, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 0
    assert "never" not in demo.conclusion(runs)
    assert demo.table(runs).row_count == 7
