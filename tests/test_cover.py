"""``on_failure="cover"``: the training is the same, whoever dies and whenever."""

import csv
import random
from pathlib import Path
from typing import Any

import pytest
from cover_runs import TOLERANCE, difference, samples, steps_of, train_double, undisturbed
from scar_ddp_runs import DOORS, Fault, world_sizes

CASES = [(door, ranks, optimizer) for door in DOORS for ranks in (3, 4) for optimizer in ("SGD", "AdamW")]
#: The others are for `make test-all`.
QUICK = [("Trainer", 3, "AdamW"), ("Accelerate", 4, "SGD")]


def kills(ranks: int, seed: int) -> list[Fault]:
    """Eight, at random points: of all but one worker at once, and then of any but that one, or nobody might be left."""
    draw = random.Random(seed)
    batches = steps_of(ranks)
    first, *slots = draw.randrange(1, batches // 2 - 2), *range(ranks)
    slots.remove(draw.choice(slots))
    together = [("training_step", first, slot, "kill") for slot in slots]
    others: list[Fault] = []
    for _ in range(8 - len(together)):
        step = draw.randrange(first + 1, batches - 1)
        # All workers start again if one dies behind the last batch of an epoch.
        is_last = (step + 1) % (batches // 2) == 0
        places = ["training_step", "backward", "before_step", *([] if is_last else ["batch_end"])]
        others.append((draw.choice(places), step, draw.choice(slots), "kill"))
    return together + others


@pytest.mark.parametrize(
    ("door", "ranks", "optimizer"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES],
)
def test_kills_change_nothing(tmp_path: Path, door: str, ranks: int, optimizer: str) -> None:
    faults = kills(ranks, seed=CASES.index((door, ranks, optimizer)))
    training = train_double(tmp_path, *faults, ranks=ranks, door=door, optimizer=optimizer)
    expected = undisturbed(door, ranks, optimizer)
    assert samples(training) == samples(expected), training.console
    assert difference(expected, training) <= TOLERANCE, training.console
    assert "1 of" in training.console
    assert "starting all workers again" not in training.console


#: By the number of ranks: rank 0 dies, and later another one, with rank 0 if any is left.
TWICE: dict[int, list[Fault]] = {
    2: [("training_step", 2, 0, "kill"), ("backward", 15, 1, "kill")],
    3: [("training_step", 4, 0, "kill"), ("training_step", 9, 0, "kill"), ("backward", 9, 1, "kill")],
}
KINDS: dict[str, dict[str, Any]] = {
    "accumulation": {"trainer": {"accumulate_grad_batches": 2}},
    # A validation gives all ranks the buffers of the first one.
    "buffers": {"model": {"rich": True}, "trainer": {"limit_val_batches": 1}},
    "dropout": {"model": {"dropout": True}},
    "accumulation, buffers and dropout": {
        "model": {"rich": True, "dropout": True},
        "trainer": {"accumulate_grad_batches": 2, "limit_val_batches": 1},
    },
    "processes that load": {"data": {"process": "fork"}},
    "static graph": {"strategy": {"static_graph": True}},
    "unused parameters": {"strategy": {"find_unused_parameters": True, "gradient_as_bucket_view": True}},
    "a batch that the step changes": {"model": {"habits": ["changes the batch"]}},
    "a layer that is frozen for a while": {
        "model": {"habits": ["freezes a layer"]},
        "strategy": {"find_unused_parameters": True},
    },
    "accumulation, and steps that know the number of a batch": {
        "model": {"habits": ["counts batches"]},
        "trainer": {"accumulate_grad_batches": 2},
    },
    "weights that the step moves": {"model": {"habits": ["moves weights"]}},
    "averaged weights": {"callbacks": ["StochasticWeightAveraging"]},
    "a rate that follows what is logged": {"model": {"habits": ["follows the loss", "collects metrics"]}},
    "all of that": {
        "model": {"habits": ["changes the batch", "freezes a layer", "follows the loss", "collects metrics"]},
        "strategy": {"find_unused_parameters": True},
        "callbacks": ["StochasticWeightAveraging"],
    },
}
#: These arguments are the Trainer's.
OF_THE_TRAINER = {
    "processes that load",
    "static graph",
    "unused parameters",
    "a layer that is frozen for a while",
    "accumulation, and steps that know the number of a batch",
    "weights that the step moves",
    "averaged weights",
    "a rate that follows what is logged",
    "all of that",
}
QUICK_KINDS = [
    ("accumulation, buffers and dropout", "Trainer"),
    ("all of that", "Trainer"),
    ("dropout", "Accelerate"),
]


@pytest.mark.parametrize(
    ("kind", "door"),
    [
        pytest.param(kind, door, marks=[] if (kind, door) in QUICK_KINDS else [pytest.mark.slow])
        for kind in KINDS
        for door in DOORS
        if door == "Trainer" or kind not in OF_THE_TRAINER
    ],
)
def test_each_kind_of_training_is_the_same(tmp_path: Path, kind: str, door: str) -> None:
    # An outage of a loop that lasts into the next epoch misses the random numbers that are drawn in between.
    ranks = 2 if "dropout" in kind and door == "Accelerate" else 3
    options = {"strategy": {}, "ranks": ranks, "door": door, **KINDS[kind]}
    training = train_double(tmp_path / "disturbed", *TWICE[ranks], **options)
    expected = train_double(tmp_path / "undisturbed", **options)
    assert samples(training) == samples(expected), training.console
    # Running statistics of rank 0 die with it.
    assert difference(expected, training, but=("running", "tracked")) <= TOLERANCE, training.console
    is_whole = "dropout" in kind or "buffers" in kind or "moves" in kind
    assert ("missing batches are computed whole, because" in training.console) == is_whole


@pytest.mark.parametrize("door", ["Accelerate", pytest.param("Fabric", marks=pytest.mark.slow)])
@pytest.mark.parametrize("slot", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_outage_lasts_into_the_next_epoch(tmp_path: Path, door: str, slot: int) -> None:
    """Of a loop, which does not wait for a replacement where an epoch ends."""
    last = steps_of(3) // 2 - 1
    faults: list[Fault] = [("training_step", last, slot, "kill"), ("start", 1, slot, "two seconds")]
    training = train_double(tmp_path, *faults, door=door)
    expected = undisturbed(door, 3, "SGD")
    sizes = {step["step"]: step["world_size"] for step in training.steps}
    assert (sizes[last + 1], sizes[last + 2]) == (2, 2), training.console
    assert samples(training) == samples(expected), training.console
    assert difference(expected, training) <= TOLERANCE, training.console


def test_what_is_logged_counts_missing_batches(tmp_path: Path) -> None:
    def losses(folder: Path, *faults: Fault) -> list[float]:
        training = train_double(folder, *faults, logs=True)
        (path,) = folder.glob("logs/*/metrics.csv")
        with path.open() as file:
            logged = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
        assert len(logged) == training.results[0]["global_step"]
        return logged

    disturbed = losses(tmp_path / "disturbed", ("training_step", 4, 1, "kill"), ("backward", 9, 2, "kill"))
    assert disturbed == pytest.approx(losses(tmp_path / "undisturbed"), rel=1e-6)


@pytest.mark.parametrize("where", ["training_step", "backward"])
def test_an_epoch_counts_each_batch_once(tmp_path: Path, where: str) -> None:
    """But those that the dead worker had counted itself. The attempt that failed does not count."""
    training = train_double(tmp_path, (where, 12, 2, "kill"))
    # If the others have not completed its last step, they make that again, too.
    before_it_died = [training.generations[step] for step in range(9, 17)].count(0)
    assert before_it_died in (3, 4)
    metrics = training.results[0]["metrics"]
    assert metrics["batches"] == 3 * 8 - before_it_died, training.console
    assert metrics["samples"] == 4 * metrics["batches"], training.console


def test_on_two_nodes_of_which_one_is_lost(tmp_path: Path) -> None:
    training = train_double(tmp_path / "disturbed", ("training_step", 4, 2, "lose the supervisor"), ranks=4, nodes=2)
    expected = train_double(tmp_path / "undisturbed", ranks=4)
    assert samples(training) == samples(expected), training.console
    assert difference(expected, training) <= TOLERANCE, training.console
    assert training.outages(0)[0]["covered_batches"] > 0


def test_a_replacement_knows_what_steps_move_before_it_has_made_one(tmp_path: Path) -> None:
    """It computes missing batches in its first step, while another replacement is on its way."""
    options: dict[str, Any] = {"model": {"habits": ["moves weights"]}}
    faults: list[Fault] = [("training_step", 4, slot, "kill") for slot in (0, 1)]
    faults += [("start", 1, 0, "two seconds"), ("batch_end", 4, 2, "a moment")]
    training = train_double(tmp_path / "disturbed", *faults, **options)
    expected = train_double(tmp_path / "undisturbed", **options)
    assert 2 in world_sizes(training), training.console
    assert difference(expected, training) <= TOLERANCE, training.console


def test_a_replacement_scales_its_losses_as_the_others_do(tmp_path: Path) -> None:
    options: dict[str, Any] = {"door": "Fabric", "model": {"scaled": True}}
    training = train_double(tmp_path / "disturbed", ("training_step", 6, 1, "kill"), **options)
    expected = train_double(tmp_path / "undisturbed", **options)
    scalers = [result["scaler"] for result in training.results.values()]
    assert scalers == [expected.results[0]["scaler"]] * 3
    assert scalers[0]["scale"] == 65536 * 2 ** (steps_of(3) // 5)
    assert difference(expected, training) <= TOLERANCE, training.console


SHRINKS: dict[str, tuple[dict[str, Any], str]] = {
    "no indices": (
        {"data": {"iterable": True, "batches": [8, 8, 8]}},
        "Stream has no indices; use a map-style dataset",
    ),
    "a gathered loss": ({"model": {"gathers": True}}, "a worker's loss depends on other workers"),
    "a closure without a batch": ({"door": "Accelerate", "passes_batch": False}, "call training_step(closure, batch)"),
    "another batch": ({"door": "Accelerate", "changes_batch": True}, "gets another batch than the loader gives"),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", SHRINKS)
def test_otherwise_the_group_shrinks_and_says_why(tmp_path: Path, kind: str) -> None:
    options, why = SHRINKS[kind]
    training = train_double(tmp_path, ("training_step", 3, 1, "kill"), **options)
    assert training.console.count("The group shrinks after a failure instead") == 1, training.console
    assert why in training.console.replace("\n", " ")
    assert training.outages(0)[0]["covered_batches"] == 0
