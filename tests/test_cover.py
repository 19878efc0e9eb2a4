"""``on_failure="cover"``: the training is the same, whoever dies and whenever."""

import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from scar_ddp_runs import DOORS, Fault, Training, assert_done, train

#: In double precision the order of a sum makes less of a difference than this; the second undisturbed run has another.
TOLERANCE = 1e-10

CASES = [(door, ranks, optimizer) for door in DOORS for ranks in (3, 4) for optimizer in ("SGD", "AdamW")]
#: The others are for `make test-all`.
QUICK = [("Trainer", 3, "AdamW"), ("Accelerate", 4, "SGD")]


def options(optimizer: str, **model: Any) -> dict[str, Any]:
    return {
        "model": {"double": True, "optimizer": optimizer, **model},
        "trainer": {"max_epochs": 2, "gradient_clip_val": 0.5, "limit_val_batches": 0},
    }


def steps_of(ranks: int) -> int:
    return 2 * (96 // 4 // ranks)


@cache
def undisturbed(door: str, ranks: int, optimizer: str) -> Training:
    with TemporaryDirectory(prefix="undisturbed-") as folder:
        training = train(Path(folder), ranks=ranks, door=door, **options(optimizer))
    assert_done(training, steps_of(ranks), ranks)
    return training


def samples(training: Training) -> dict[int, list[int]]:
    """Of each step, over all workers."""
    used: dict[int, list[int]] = {}
    for step in training.steps:
        used.setdefault(step["step"], []).extend(i for batch in step["used"] for i in batch)
    return {step: sorted(ids) for step, ids in used.items()}


def difference(a: Training, b: Training) -> float:
    """The largest one of a parameter, relative to the largest value of its tensor."""
    pairs = [(values, b.state["state_dict"][name]) for name, values in a.state["state_dict"].items()]
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in pairs)


def kills(ranks: int, seed: int) -> list[Fault]:
    """Eight, at random points: of all but one worker at once, and then of any but that one, or nobody might be left."""
    draw = random.Random(seed)
    batches = steps_of(ranks)
    first, *slots = draw.randrange(1, batches // 2 - 2), *range(ranks)
    slots.remove(draw.choice(slots))
    together = [("training_step", first, slot, "kill") for slot in slots]
    places = ["training_step", "backward", "before_step", "batch_end"]
    others = [
        (draw.choice(places), draw.randrange(first + 1, batches - 1), draw.choice(slots), "kill")
        for _ in range(8 - len(together))
    ]
    return together + others


@pytest.mark.parametrize(
    ("door", "ranks", "optimizer"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES],
)
def test_kills_change_nothing(tmp_path: Path, door: str, ranks: int, optimizer: str) -> None:
    faults = kills(ranks, seed=CASES.index((door, ranks, optimizer)))
    training = train(tmp_path, *faults, ranks=ranks, door=door, run=("--max-restarts", "99"), **options(optimizer))
    assert_done(training, steps_of(ranks), ranks)
    expected = undisturbed(door, ranks, optimizer)
    assert samples(training) == samples(expected), training.console
    assert difference(expected, training) <= TOLERANCE, training.console
    assert "1 of" in training.console
    assert "starting all workers again" not in training.console
