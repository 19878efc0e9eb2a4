"""``strategy="scar_ddp"``: workers die in their steps, and the others go on. Real processes, real signals."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same
from scar_ddp_runs import (
    DOORS,
    WITH_DROPOUT,
    Fault,
    assert_done,
    assert_lived_through,
    assert_steps_of_what_they_saw,
    reference,
    train,
    world_sizes,
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("door", ["Trainer", pytest.param("Accelerate", marks=pytest.mark.slow)])
def test_without_failures_parameters_are_those_of_ddp_bit_for_bit(tmp_path: Path, door: str) -> None:
    # Only a Trainer becomes its own supervisor.
    how: dict[str, Any] = {"run": None} if door == "Trainer" else {}
    training = train(tmp_path, door=door, real=True, limit=280, **how, **WITH_DROPOUT)
    assert_done(training, steps=36)
    assert training.outages(0) == []
    assert "lightning-scar" not in training.console
    assert_same(training.state, reference(dropout=True, door=door))


@pytest.mark.parametrize("door", ["Trainer", "Accelerate", pytest.param("Fabric", marks=pytest.mark.slow)])
def test_the_others_go_on_as_a_smaller_group(tmp_path: Path, door: str) -> None:
    """A death in a step's forward, and one behind a step."""
    # A Trainer waits for a full group where an epoch ends, a loop where it ends itself.
    epochs, late = (3, 11) if door == "Trainer" else (9, 60)
    faults = [("training_step", 2, 0, "kill"), ("batch_end", late, 2, "kill")]
    training = train(tmp_path, *faults, ranks=3, trainer={"max_epochs": epochs}, door=door)
    assert_done(training, steps=8 * epochs, ranks=3)
    killed = ["rank 0 was killed by SIGKILL", "rank 2 was killed by SIGKILL"]
    assert_lived_through(training, 1, *killed)
    # Replacements have the history of whoever gave them the state.
    for rank in (0, 2):
        assert [outage["reason"] for outage in training.outages(rank)] == killed
    first, second = (outage["step"] for outage in training.outages(1))
    assert (first, second) == (2, late + 1)
    sizes = world_sizes(training)
    assert [*sizes[:2], sizes[late]] == [3] * 3
    if door == "Trainer":
        assert sizes[8:12] + sizes[16:] == [3] * 12
    assert sizes[first] == sizes[second] == 2
    assert len(training.processes) == 5
    assert_steps_of_what_they_saw(training)


@pytest.mark.parametrize("door", ["Trainer", pytest.param("Accelerate", marks=pytest.mark.slow)])
def test_one_of_three_is_left(tmp_path: Path, door: str) -> None:
    faults = [("backward", 3, 0, "kill"), ("backward", 3, 2, "kill")]
    training = train(tmp_path, *faults, ranks=3, door=door)
    assert_done(training, steps=16, ranks=3)
    assert_lived_through(training, 1, "killed by SIGKILL")
    assert "1 of 3 workers go on" in training.console
    assert world_sizes(training)[3] == 1
    assert_steps_of_what_they_saw(training)


@pytest.mark.parametrize("door", [pytest.param("Trainer", marks=pytest.mark.slow), "Accelerate"])
def test_weights_wait_for_the_replacement(tmp_path: Path, door: str) -> None:
    """Each death is of another kind."""
    faults = [("training_step", 3, 0, "error"), ("before_step", 15, 0, "exit"), ("training_step", 30, 0, "memory")]
    training = train(tmp_path, *faults, strategy={"on_failure": "wait"}, trainer={"max_epochs": 3}, door=door)
    assert_done(training, steps=36)
    assert_lived_through(training, 1, "rank 0 exited with code 1", "rank 0 exited with code 3", "rank 0 exited with")
    assert "ValueError: a bug of this rank alone" in training.console
    assert "MemoryError" in training.console
    # The interrupted step is made without the dead one's part; no other.
    assert [i for i, size in enumerate(world_sizes(training)) if size == 1] == [3, 16, 30]
    assert_steps_of_what_they_saw(training)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("flush", ["mean", "replay"])
@pytest.mark.parametrize("door", DOORS)
def test_stale_gradients_are_applied_when_the_replacement_is_there(tmp_path: Path, flush: str, door: str) -> None:
    strategy = {"on_failure": "buffer", "flush": flush, "max_staleness": 4}
    training = train(tmp_path, ("training_step", 3, 0, "kill"), ranks=3, strategy=strategy, door=door)
    assert training.code == 0, training.console
    outages = [training.outages(rank)[0] for rank in (1, 2)]
    assert all(0 < outage["stale_gradients"] <= 4 for outage in outages), outages
    assert "2 of 3 workers collect stale gradients" in training.console
    if flush == "mean":
        assert_done(training, steps=16, ranks=3)
        assert_steps_of_what_they_saw(training)
        # Who died may have completed the step before, and the others not.
        number = outages[0]["step"] + 1
        interrupted = [step for step in training.steps if step["step"] == number and step["slot"] > 0]
        assert [len(step["used"]) - 1 for step in interrupted] == [o["stale_gradients"] for o in outages]
    else:
        assert_same([training.results[rank]["state"] for rank in (1, 2)], [training.state] * 2)
        assert training.results[0]["global_step"] == 16


@pytest.mark.parametrize("door", DOORS)
def test_a_synchronising_micro_batch_is_repeated_with_the_gradients_of_those_before(tmp_path: Path, door: str) -> None:
    faults: list[Fault] = [("training_step", 5, 0, "kill"), ("backward", 17, 1, "kill")]
    trainer = {"accumulate_grad_batches": 3}
    training = train(tmp_path, *faults, strategy={"on_failure": "wait"}, trainer=trainer, door=door)
    assert_done(training, steps=8)
    assert world_sizes(training) == [2, 1, 2, 2, 2, 1, 2, 2]
    # Each rank's three micro-batches are all there, once.
    assert all(len(step["used"]) == 3 for step in training.steps)
    assert_steps_of_what_they_saw(training)


@pytest.mark.parametrize(
    ("way", "door"),
    [
        ("the strategy's argument", "Trainer"),
        pytest.param("--hang-timeout", "Trainer", marks=pytest.mark.slow),
        pytest.param("--hang-timeout", "Accelerate", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_hangs_is_replaced(tmp_path: Path, way: str, door: str) -> None:
    by_argument = way == "the strategy's argument"
    # In so many seconds the first group has to form, too, however unevenly the workers start.
    how: dict[str, Any] = {"strategy": {"hang_timeout": 10}, "run": None} if by_argument else {}
    training = train(tmp_path, ("training_step", 4, 0, "stop"), door=door, **{"run": ["--hang-timeout", "10"], **how})
    assert_done(training, steps=24)
    assert_lived_through(training, 1, "rank 0 hung and was killed")
    assert_steps_of_what_they_saw(training)


@pytest.mark.parametrize("door", ["Trainer", pytest.param("Accelerate", marks=pytest.mark.slow)])
def test_a_replacement_dies_on_its_way_in(tmp_path: Path, door: str) -> None:
    """In its start-up, and right before it would have joined."""
    faults = [("training_step", 2, 1, "kill"), ("setup", 1, 1, "kill"), ("join", 2, 1, "kill")]
    training = train(tmp_path, *faults, door=door)
    assert_done(training, steps=24)
    assert_lived_through(training, 0, "rank 1 was killed by SIGKILL")
    assert len(training.processes) == 5
    assert_steps_of_what_they_saw(training)


@pytest.mark.parametrize("door", ["Trainer", pytest.param("Accelerate", marks=pytest.mark.slow)])
def test_a_replacement_draws_what_the_dead_worker_would_have_drawn(tmp_path: Path, door: str) -> None:
    """They die before anybody has their gradients, when all may have them, and between two steps."""
    faults: list[Fault] = [("backward", 3, 1, "kill"), ("before_step", 8, 0, "kill"), ("batch_end", 15, 1, "kill")]
    how: dict[str, Any] = {"strategy": {"on_failure": "wait"}, "model": {"dropout": True}, "seeds": True}
    training = train(tmp_path, *faults, door=door, **how)
    assert_done(training, steps=24)
    assert len(training.processes) == 5
    for slot in (0, 1):
        made = [step for step in training.steps if step["slot"] == slot]
        assert len(made) < 24
        for step, following in pairwise(made):
            # Where an epoch begins, the loader draws a number.
            goes_on = following["random"][0] == step["random"][1]
            assert goes_on or step["step"] <= 12 < following["step"], f"rank {slot}: {step}, {following}"
        assert len({step["random"][0] for step in made}) == len(made)
    first = {step["slot"]: step["random"][0] for step in training.steps if step["step"] == 1}
    assert first[0] != first[1]
