"""Where no step can be made again in the same process, all workers start again from the exact state."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same
from scar_ddp_runs import REFERENCE, WITH_DROPOUT, Fault, assert_done, reference, train, world_sizes

ENDINGS = {"kill": "was killed by SIGKILL", "error": "exited with code 1", "exit": "exited with code 3"}
CASES: dict[str, list[Fault]] = {
    "killed, of rank 1": [("validation", 1, 1, "kill")],
    "an error, an exit, of rank 0": [("validation", 0, 0, "error"), ("validation", 1, 0, "exit")],
    "in a save": [("save", 1, 0, "kill")],
    "at start-up": [("setup", 0, 1, "kill"), ("start", 1, 0, "kill")],
}


#: The hook of a save is the Trainer's; of the other loops one case tells enough.
THROUGH = [
    *((case, "Trainer") for case in CASES),
    *((case, "Accelerate") for case in CASES if case != "in a save"),
    ("killed, of rank 1", "Fabric"),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("case", "door"), THROUGH)
def test_a_failure_outside_of_steps_costs_nothing_but_time(tmp_path: Path, case: str, door: str) -> None:
    callbacks = ["ModelCheckpoint"] if case == "in a save" else []
    training = train(tmp_path, *CASES[case], **WITH_DROPOUT, callbacks=callbacks, door=door)
    assert_done(training, steps=36)
    assert_same(training.state, reference(dropout=True, door=door))
    assert "starting all workers again" in training.console
    for _, _, slot, how in CASES[case]:
        assert f"rank {slot} {ENDINGS[how]}; " in training.console
    # A generation that never began has no outage.
    if case != "at start-up":
        assert len(training.outages(0)) == len(CASES[case])


@pytest.mark.parametrize("where", [("epoch_end", 1), pytest.param(("validation", 1), marks=pytest.mark.slow)])
def test_a_worker_that_dies_behind_the_last_step_has_nothing_trained_twice(
    tmp_path: Path, where: tuple[str, int]
) -> None:
    """The other one, which has done all that it has to do, waits for it, and keeps the state."""
    training = train(tmp_path, (*where, 0, "die late"))
    assert_done(training, steps=24)
    assert "starting all workers again" in training.console


@pytest.mark.parametrize("door", ["Trainer", pytest.param("Accelerate", marks=pytest.mark.slow)])
def test_an_optimizer_that_fails_after_it_has_changed_parameters_is_not_stepped_twice(
    tmp_path: Path, door: str
) -> None:
    """Rank 1 dies when all gradients are there, so rank 0 fails where the optimizer communicates behind its step."""
    scar = {"every_n_train_steps": 4, "fraction": 1.0}
    options: dict[str, Any] = {"model": {"averaging": True}, "scar": scar, "door": door}
    undisturbed = train(tmp_path / "undisturbed", **options)
    training = train(tmp_path / "cut short", ("before_step", 6, 1, "kill"), **options)
    assert training.code == 0, training.console
    assert "nobody has a whole state, since an update was cut short; the last save counts" in training.console
    assert "starting all workers again" in training.console
    # Those behind the save at the fourth are made again.
    made = [step["step"] for step in training.steps if step["slot"] == 0]
    assert made == [*range(1, 8), *range(5, 25)]
    for training_result in (training.results[0], training.results[1]):
        assert_same(training_result["state"], undisturbed.state)


def test_the_state_that_one_node_keeps_goes_to_the_others(tmp_path: Path) -> None:
    """Rank 0 and its node's memory are ahead; then the other node is the one that keeps it."""
    faults: list[Fault] = [("validation", 0, 1, "kill"), ("training_step", 15, 1, "kill"), ("validation", 1, 0, "kill")]
    training = train(tmp_path, *faults, nodes=2, **REFERENCE)
    assert_done(training, steps=36)
    assert training.console.count("starting all workers again") == 2
    assert len({process["state"] for process in training.processes}) == 2
    assert world_sizes(training)[15] == 1


@pytest.mark.parametrize("when", ["before", pytest.param("behind", marks=pytest.mark.slow)])
def test_a_job_that_began_anew_does_not_restart_with_an_older_ones_state(tmp_path: Path, when: str) -> None:
    """A death in an epoch's evaluation, before and behind the first save of the job itself."""
    older = train(tmp_path / "older", door="Accelerate", trainer={"max_epochs": 4}, scar={"every_n_train_steps": 4})
    assert_done(older, steps=48)
    shutil.copytree(tmp_path / "older" / "scar", tmp_path / "newer" / "scar")
    every = 1000 if when == "before" else 4
    options = {"every_n_train_steps": every, "resume": False}
    newer = train(tmp_path / "newer", ("validation", 0, 1, "kill"), door="Accelerate", scar=options)
    assert_done(newer, steps=24)
    assert "starting all workers again" in newer.console
    assert "resuming from the running checkpoint" not in newer.console
