"""Runs that end at every place where an epoch ends, again and again, and go on as if nothing had happened."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from helpers import Stopped, assert_same
from progress_runs import WAYS, Dies, Killed, run, run_rank
from ranks import run_ranks

PLACES = {
    "the next batch": "on_train_batch_start",
    "the start of the validation": "on_validation_start",
    "the validation": "on_validation_batch_start",
    "the end of the validation": "on_validation_epoch_end",
    "behind the validation": "on_validation_end",
    "the end of the epoch": "on_train_epoch_end",
    "the start of the next epoch": "on_train_epoch_start",
}
WITHOUT = ("no validation", "max_steps without validation")
CASES = [(way, place) for way in WAYS for place in PLACES if "validation" not in place or way not in WITHOUT]


def some(chosen: list[tuple[str, str]], cases: list[tuple[str, str]] = CASES) -> list[Any]:
    """All cases, of which all but the chosen ones are slow."""
    assert set(chosen) <= set(cases)
    return [pytest.param(*case, marks=[] if case in chosen else pytest.mark.slow) for case in cases]


KILLED = [
    *(("a validation each epoch", place) for place in [*PLACES][::2]),
    ("within an epoch, not at its end", "the next batch"),
    ("across epochs", "the validation"),
    ("every second epoch", "the end of the epoch"),
    ("no validation", "the end of the epoch"),
    ("accumulated", "behind the validation"),
]


@pytest.mark.parametrize(("way", "place"), some(KILLED))
def test_a_run_that_dies_where_an_epoch_ends_goes_on(way: str, place: str, tmp_path: Path) -> None:
    _live_and_die(way, place, tmp_path)


FAILED = [("a validation each epoch", "the end of the epoch"), ("no validation", "the start of the next epoch")]


@pytest.mark.parametrize(("way", "place"), some(FAILED))
def test_a_run_that_an_error_ends_there_goes_on_from_its_last_save(way: str, place: str, tmp_path: Path) -> None:
    _live_and_die(way, place, tmp_path, error=Stopped, save_on_exception=True, every_n_train_steps=5)


OF_TWO = [("a validation each epoch", place) for place in PLACES] + [
    ("within an epoch", "the validation"),
    ("no validation", "the end of the epoch"),
]


@pytest.mark.parametrize(("way", "place"), some(OF_TWO[2:3], OF_TWO))
def test_two_ranks_that_die_there_go_on(way: str, place: str, tmp_path: Path) -> None:
    for whole, resumed in run_ranks(run_rank, 2, way, tmp_path, PLACES[place], _times(way, PLACES[place])):
        assert_same(resumed, whole)


@pytest.mark.parametrize("way", ["max_steps", "max_steps without validation"])
def test_a_run_that_its_limit_ended_within_an_epoch_trains_on_there(way: str, tmp_path: Path) -> None:
    for steps in (12, 21):
        run(way, tmp_path, more={"max_steps": steps})
    resumed, whole = run(way, tmp_path), _undisturbed(way)
    # Lightning ends an epoch when it ends a run, so callbacks have seen the ends of two parts more.
    for name in ("global_step", "state_dict", "optimizer_states", "loops"):
        assert_same(resumed[name], whole[name], name)


def _live_and_die(way: str, place: str, folder: Path, error: type[BaseException] = Killed, **options: Any) -> None:
    times = _times(way, PLACES[place])
    left = list(times)
    for _ in times:
        with pytest.raises(error):
            run(way, folder, Dies(PLACES[place], left, error), **options)
    assert not left
    resumed, whole = run(way, folder, **options), _undisturbed(way)
    if error is Stopped and place == "the next batch":
        # It began twice, and its first hooks were called.
        resumed, whole = ({**end, "lines": sorted(set(end["lines"]))} for end in (resumed, whole))
    assert_same(resumed, whole)


@cache
def _undisturbed(way: str) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        return run(way, Path(folder))


def _times(way: str, hook: str) -> list[int]:
    """After which steps an undisturbed run comes to a hook where an epoch ends: the first two times, and the last."""
    said = {"on_validation_batch_start": "on_validation_batch_end"}.get(hook, hook)
    lines = [line.split() for line in _undisturbed(way)["lines"]]
    seen = {int(step) for name, _, step, *_ in lines if name == said} - {0}
    if hook == "on_train_batch_start":
        seen &= {int(step) for name, _, step, *_ in lines if name == "on_train_epoch_end"}
    times = sorted(seen)
    return sorted({*times[:2], times[-1]})
