"""Deaths in batches that make no step: gradients accumulate, and what they log is synchronised."""

from pathlib import Path

import pytest
from scar_ddp_runs import Fault, assert_done, assert_steps_of_what_they_saw, train, world_sizes

TRAINER = {"accumulate_grad_batches": 3}


@pytest.mark.parametrize(("door", "rich"), [("Trainer", False), ("Trainer", True), ("Accelerate", True)])
def test_survivors_go_on_behind_a_death_in_a_batch_that_makes_no_step(tmp_path: Path, door: str, rich: bool) -> None:
    """In the second of three batches, and in the first, where DDP gives all the buffers of the first rank."""
    faults: list[Fault] = [("training_step", 4, 0, "kill"), ("training_step", 15, 1, "kill")]
    strategy, model = {"on_failure": "wait"}, {"rich": rich}
    training = train(tmp_path, *faults, strategy=strategy, trainer=TRAINER, door=door, model=model)
    assert_done(training, steps=8)
    assert "starting all workers again" not in training.console
    assert world_sizes(training) == [2, 1, 2, 2, 2, 1, 2, 2]
    assert all(len(step["used"]) == 3 for step in training.steps)
    assert [len(training.outages(rank)) for rank in (0, 1)] == [2, 2]
    if not rich:
        assert_steps_of_what_they_saw(training)


def test_one_that_is_a_step_behind_makes_its_batches_alone_up_to_the_step_of_the_others(tmp_path: Path) -> None:
    """Behind the collectives of a step: the other one has completed it, and is in the batches of the next."""
    training = train(tmp_path, ("before_step", 5, 1, "disconnect"), trainer=TRAINER)
    assert_done(training, steps=8)
    assert "starting all workers again" not in training.console
    assert world_sizes(training) == [2] * 8
    assert_steps_of_what_they_saw(training)
