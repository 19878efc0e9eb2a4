"""The simulated outages of ``benchmarks.paper`` take the time, and make the steps, that they should."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.paper import outages
from benchmarks.paper.outage_ways import BASELINES, GROUP, SERVER, WAYS, Schedule, simulate
from benchmarks.paper.training import ModuleTraining

RATE = 0.01
ONCE = Schedule(units=20, down_at=(7,), down_for=4)
#: Of three workers: 48 and 51 gradients are pending.
FEW, MANY = Schedule(30, (5,), 16), Schedule(30, (5,), 17)


def slope(seed: int) -> ModuleTraining:
    """The loss is the weight, which falls by the rate with every step."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    batch = (torch.ones(1, 1),)
    optimizer = partial(torch.optim.SGD, lr=RATE)
    return ModuleTraining(model, optimizer, lambda generator: batch, lambda m, b: m(b[0]).mean(), batch, seed)


def quadratic(seed: int, optimizer: Callable[..., Optimizer] = torch.optim.SGD) -> ModuleTraining:
    """Noisy, and with a state of the optimizer if that is Adam."""
    torch.manual_seed(seed)
    held = (torch.linspace(-1, 1, 24).reshape(8, 3),)
    return ModuleTraining(
        nn.Linear(3, 1),
        partial(optimizer, lr=0.05),
        lambda generator: (torch.randn(4, 3, generator=generator),),
        lambda model, batch: (model(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean(),
        held,
        seed,
    )


def steps_of(way: str, schedule: Schedule) -> float:
    """How many usual steps the run made."""
    return -simulate(WAYS[way], slope, 0, schedule)[-1] / RATE


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_without_an_outage_all_ways_are_one(optimizer: Callable[..., Optimizer]) -> None:
    start, calm = partial(quadratic, optimizer=optimizer), Schedule(12, (), 4)
    expected = simulate(WAYS["none"], start, 3, calm)
    assert len(set(expected)) == 12
    for way in WAYS.values():
        assert simulate(way, start, 3, calm) == expected, way.name


def test_no_failure_is_no_outage() -> None:
    assert simulate(WAYS["none"], quadratic, 0, ONCE) == simulate(WAYS["none"], quadratic, 0, Schedule(20, (), 0))


def test_every_way_gives_a_loss_for_every_unit_and_gives_it_again() -> None:
    for way in (*BASELINES, *SERVER, *GROUP):
        losses = simulate(way, quadratic, 0, ONCE)
        assert len(losses) == ONCE.units
        assert losses == simulate(way, quadratic, 0, ONCE), way.name
        assert losses[:7] == simulate(WAYS["none"], quadratic, 0, ONCE)[:7]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_waiting_only_shifts_a_run(optimizer: Callable[..., Optimizer]) -> None:
    start = partial(quadratic, optimizer=optimizer)
    calm = simulate(WAYS["none"], start, 0, ONCE)
    assert simulate(WAYS["wait"], start, 0, ONCE) == calm[:7] + 4 * [calm[6]] + calm[7:16]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_covering_makes_the_updates_of_a_run_without_a_failure_and_fewer_of_them(
    optimizer: Callable[..., Optimizer],
) -> None:
    start = partial(quadratic, optimizer=optimizer)
    calm = simulate(WAYS["none"], start, 0, ONCE)
    # One unit without anybody, then two updates in three units.
    held = [calm[6], calm[6], calm[7], calm[8]]
    assert simulate(WAYS["cover"], start, 0, ONCE) == calm[:7] + held + calm[9:18]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_the_mean_step_is_that_of_one_large_batch_after_an_outage(optimizer: Callable[..., Optimizer]) -> None:
    start = partial(quadratic, optimizer=optimizer)
    mean, large = (simulate(WAYS[way], start, 0, ONCE) for way in ("mean", "large_batch"))
    assert mean[11:] == large[7:16]
    assert mean[:11] == large[:7] + 4 * [large[6]]


def test_the_sum_is_as_long_as_the_missed_steps_until_the_rule_lowers_the_rate() -> None:
    assert steps_of("sum", FEW) == pytest.approx(30, rel=1e-3)
    assert steps_of("sum", MANY) == pytest.approx(30 - 17 + 1.7, rel=1e-3)


@pytest.mark.parametrize(
    ("way", "steps"),
    [
        *(("none", 30), ("large_batch", 31), ("checkpoint", 9), ("chain", 29), ("chain_async", 24)),
        # Sixteen contributions in eight steps, of which the last is of nine; a discount shortens them.
        *(
            ("replay", 22),
            ("discount", 14 + sum(1 / (1 + i) for i in range(7)) + sum(1 / (1 + i) for i in range(7, 16)) / 9),
        ),
        *(("mean", 15), ("clipped", 15), ("local_server", 30)),
        *(("wait", 14), ("buffer", 15), ("shrink", 29), ("cover", 24), ("local_sgd", 30)),
    ],
)
def test_steps_that_a_way_makes(way: str, steps: float) -> None:
    assert steps_of(way, FEW) == pytest.approx(steps, rel=1e-3)


def test_a_checkpoint_loses_the_updates_since_it_was_written_and_its_optimizer_with_them() -> None:
    schedule, start = Schedule(30, (13,), 2), partial(quadratic, optimizer=torch.optim.Adam)
    calm = simulate(WAYS["none"], start, 0, schedule)
    found = simulate(WAYS["checkpoint"], start, 0, schedule)
    assert found[13:15] == 2 * [calm[12]]
    batches_go_on = simulate(WAYS["checkpoint"], slope, 0, schedule)
    assert batches_go_on[15] == pytest.approx(-11 * RATE)
    assert found[15] not in calm


def test_a_dead_rank_is_missed_until_it_is_replaced() -> None:
    calm, shrunk = (simulate(WAYS[way], quadratic, 0, ONCE) for way in ("none", "shrink"))
    chain = simulate(WAYS["chain"], quadratic, 0, ONCE)
    assert shrunk[7] == chain[7] == calm[6]
    assert shrunk[8] != chain[8] == calm[7]


def test_seeds_get_batches_of_their_own() -> None:
    first, second = (simulate(WAYS["none"], outages.regression, seed, Schedule(2, (), 0)) for seed in (0, 1))
    assert first != second


def test_figures_tables_sentences_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = outages.measure(trials=2, seed=0, quick=True)
    for way in WAYS:
        assert math.isfinite(found[f"regression_{way}_loss"])
        assert found[f"regression_{way}_loss_interval"] > 0
    assert found["regression_checkpoint_ahead_of_wait"] == 0
    outages.show(found)
    assert "large_batch" in capsys.readouterr().out
    sentences = outages.conclusions(found)
    assert sentences == outages.conclusions(json.loads(json.dumps(found)))
    assert any("buffer against shrink: " in sentence for sentence in sentences)
    outages.draw(found, tmp_path / "outages.png")
    assert (tmp_path / "outages.png").read_bytes().startswith(b"\x89PNG")


def test_the_interval_is_that_of_student() -> None:
    # The quantile for nine degrees of freedom is 2.262, and the samples' deviation 3.028.
    assert outages.interval(range(10)) == pytest.approx(2.262 * 3.0277 / math.sqrt(10), rel=5e-3)
