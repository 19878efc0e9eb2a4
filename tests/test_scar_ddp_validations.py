"""A validation that the death of a worker cut short is made again, under ``scar_ddp``."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from helpers import assert_same
from scar_ddp_runs import Fault, Training, assert_done, train

WATCHED = ["Validations", "EarlyStopping at its defaults", "ModelCheckpoint"]
WAYS: dict[str, dict[str, Any]] = {
    "each epoch": {"callbacks": WATCHED[:2]},
    "within an epoch": {"callbacks": WATCHED, "trainer": {"val_check_interval": 0.25}},
    "a plateau": {"callbacks": WATCHED, "model": {"plateau": True, "dropout": True}},
}
#: Where rank 1, or rank 0, dies.
PLACES: dict[str, list[Fault]] = {
    "in the first validation": [("validation", 0, 1, "kill")],
    "in both": [("validation", 0, 1, "error"), ("validation", 1, 0, "kill")],
    "in a save": [("save", 0, 1, "kill")],
}
CASES = [
    ("each epoch", "in the first validation"),
    *(
        pytest.param(way, place, marks=pytest.mark.slow)
        for way in WAYS
        for place in PLACES
        if (way, place) not in [("each epoch", "in the first validation"), ("each epoch", "in a save")]
    ),
]


@cache
def _undisturbed(way: str) -> Training:
    with TemporaryDirectory(prefix="undisturbed-") as folder:
        training = train(Path(folder), **WAYS[way])
        assert_done(training, steps=24)
        return training


def _counts(training: Training) -> dict[str, Any]:
    """What callbacks counted, without paths."""
    callbacks = dict(training.results[0]["callbacks"])
    if "ModelCheckpoint" in callbacks:
        state = callbacks["ModelCheckpoint"]
        callbacks["ModelCheckpoint"] = [state["best_model_score"], state["kth_value"], len(state["best_k_models"])]
    return callbacks


@pytest.mark.parametrize(("way", "place"), CASES)
def test_a_run_ends_as_without_a_death_in_its_validation(way: str, place: str, tmp_path: Path) -> None:
    training = train(tmp_path, *PLACES[place], **WAYS[way])
    assert_done(training, steps=24)
    assert_same(training.state, _undisturbed(way).state)
    assert_same(_counts(training), _counts(_undisturbed(way)))


def test_an_error_in_every_validation_ends_the_job(tmp_path: Path) -> None:
    faults: list[Fault] = [("validation", 0, 1, "error")] * 9
    training = train(tmp_path, *faults, run=["--max-restarts", "2"], callbacks=WATCHED[:1])
    assert training.code == 1, training.console
    assert "a bug of this rank alone" in training.console
    assert not training.results


@pytest.mark.slow
def test_a_death_in_the_sanity_check_is_not_the_end(tmp_path: Path) -> None:
    training = train(tmp_path, ("sanity check", 0, 1, "kill"), **WAYS["each epoch"])
    assert_done(training, steps=24)
    assert_same(training.state, _undisturbed("each epoch").state)
    assert_same(_counts(training), _counts(_undisturbed("each epoch")))


@pytest.mark.slow
def test_survivors_go_on_with_what_is_their_own(tmp_path: Path) -> None:
    """Each of three ranks has an order of its own; no survivor's is that of the one that kept the state."""
    options: dict[str, Any] = {"ranks": 3, "data": {"own": True}, "model": {"dropout": True}}
    options["trainer"] = {"use_distributed_sampler": False, "val_check_interval": 0.5, "max_epochs": 2}

    def used(folder: Path, *faults: Fault) -> dict[int, dict[int, Any]]:
        training = train(folder, *faults, **options)
        assert training.code == 0, training.console
        return {slot: {s["step"]: s["used"] for s in training.steps if s["slot"] == slot} for slot in (1, 2)}

    assert used(tmp_path / "cut", ("validation", 0, 0, "kill")) == used(tmp_path / "whole")
