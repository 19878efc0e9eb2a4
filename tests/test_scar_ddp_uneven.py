"""Ranks that have different numbers of batches: one ends its epoch, or its loop, while another goes on."""

import re
from pathlib import Path
from typing import Any

import pytest
from scar_ddp_runs import train

from lightning_scar import load

UNEVEN: dict[str, Any] = {"data": {"iterable": True, "batches": [6, 9]}}
#: What follows the sixth batch of rank 0: the end of the training, the next epoch, a validation.
FOLLOWS: dict[str, dict[str, Any]] = {
    "the end": {"max_epochs": 1, "limit_val_batches": 0},
    "an epoch": {"max_epochs": 3, "limit_val_batches": 0},
    "a validation": {"max_epochs": 3},
}
SCAR = {"every_n_train_steps": 4, "fraction": 1.0}


@pytest.mark.parametrize(
    ("follows", "door"),
    [
        ("the end", "Trainer"),
        ("a validation", "Trainer"),
        pytest.param("an epoch", "Trainer", marks=pytest.mark.slow),
        ("the end", "Accelerate"),
        pytest.param("a validation", "Accelerate", marks=pytest.mark.slow),
        pytest.param("the end", "Fabric", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_has_no_more_batches_ends_the_job_with_the_cause(tmp_path: Path, follows: str, door: str) -> None:
    training = train(tmp_path, trainer=FOLLOWS[follows], scar=SCAR, door=door, limit=60, **UNEVEN)
    assert training.code == 1, training.console
    # Where nobody waits for the other, some batches of two epochs make steps together.
    step = r"\d+" if follows == "an epoch" else "6"
    assert re.search(f"the job failed: rank 0 has no more batches after step {step}, but rank 1 has", training.console)
    assert "the same number of batches" in training.console
    assert "starting" not in training.console
    if follows != "an epoch":
        assert max(step["step"] for step in training.steps) <= 7
        assert load(tmp_path / "scar")["global_step"] == 6


@pytest.mark.slow
def test_a_loop_that_leaves_its_epochs_early_ends_the_job_with_the_cause(tmp_path: Path) -> None:
    data = {"batches": [6, 99], "breaks": True}
    training = train(tmp_path, trainer=FOLLOWS["an epoch"], scar=SCAR, door="Accelerate", limit=60, data=data)
    assert training.code == 1, training.console
    assert re.search(r"the job failed: rank 0 has no more batches after step \d+, but rank 1 has", training.console)
    assert "starting" not in training.console
