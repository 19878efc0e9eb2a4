"""The comparison at equal overhead: its arithmetic on known numbers, and a tiny run, in which no figure counts."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.paper.equal_overhead import (
    KINDS,
    conclusions,
    interval,
    measure,
    rework,
    round_robin,
    rows,
    show,
    targets,
)
from benchmarks.paper.save_costs import Cost
from benchmarks.stretches import Stretch, added, blocked

METHODS = {"torch", "async", "dcp", "dcp_overlapped", "scar"}


@pytest.mark.parametrize(
    ("cost", "until_written", "step", "expected"),
    [
        (0.5, 2.0, 1.0, 50),
        (0.501, 2.0, 1.0, 51),
        (0.5, 2.0, 0.25, 200),
        # The writer limits it, not the budget.
        (0.01, 7.2, 1.0, 8),
        (0.0, 0.0, 1.0, 1),
    ],
)
def test_the_interval_is_the_shortest_that_budget_and_writer_allow(
    cost: float, until_written: float, step: float, expected: int
) -> None:
    assert interval(cost, until_written, step, budget=0.01) == expected


def test_rework_is_half_an_interval_the_time_to_write_and_what_a_save_leaves_out() -> None:
    assert rework(10, until_written=3.0) == 8.0
    assert rework(10, until_written=3.0, after_save=20.0) == 28.0


def test_blocks_by_turns_are_half_a_round_old_at_a_random_moment() -> None:
    assert round_robin(10, fraction=0.125) == sum(10 * age for age in range(8)) / 8
    assert rework(10, 0.0, round_robin(10, fraction=0.125)) == 10 * 8 / 2


COSTS = {
    "torch": Cost(stall=10.0, loop=10.0, written=10.0, steps=0.0, bytes=8e9),
    "async": Cost(stall=1.0, loop=4.0, written=12.0, steps=8.0, bytes=8e9),
    "scar": Cost(stall=0.02, loop=0.4, written=1.4, steps=1.0, bytes=1e9),
}


def test_rows_follow_from_the_costs() -> None:
    found = {(row.kind, row.method): row for row in rows(COSTS, step=1.0, after_save=lambda interval: 2.0 * interval)}
    assert {key: (row.interval, row.rework) for key, row in found.items()} == {
        ("stall", "torch"): (1000, 500.0),
        ("stall", "async"): (100, 58.0),
        ("stall", "scar"): (2, 6.0),
        ("loop", "torch"): (1000, 500.0),
        ("loop", "async"): (400, 208.0),
        ("loop", "scar"): (40, 101.0),
    }
    scar = found["stall", "scar"]
    assert (scar.overhead, scar.slowdown, scar.over_torch) == pytest.approx((0.01, 0.2, 0.012))
    # The time of a step makes seconds of steps, and longer intervals of shorter steps.
    halved = rows(COSTS, step=0.5, after_save=lambda interval: 2.0 * interval)[0]
    assert (halved.interval, halved.rework, halved.rework_s) == (2000, 1000.0, 500.0)


def figures(after_save: float) -> dict[str, Any]:
    found = rows(COSTS, step=1.0, after_save=lambda interval: after_save * interval)
    estimates = [{"interval": 2, "steps": 2 * after_save, "saves": 16, "skipped": 0}]
    costs = {method: asdict(cost) for method, cost in COSTS.items()}
    samples = {method: {kind: [getattr(cost, kind) / 2, 3.0] for kind in KINDS} for method, cost in COSTS.items()}
    shown = {"costs": costs, "samples": samples, "estimates": estimates, "rows": [asdict(row) for row in found]}
    return {"gpt": shown}


def test_conclusions_name_who_loses_least() -> None:
    stall, loop = conclusions(figures(after_save=2.0))
    assert "SCAR loses least; a crash costs, in steps: scar 6.0, async 58.0, torch 500.0." in stall
    assert "One save cost 0.01 to 3 s (scar), 0.5 to 3 s (async)." in stall
    assert "A save of scar adds 0.04 times what one of torch adds." in stall
    assert "slowed by more than the budget: async 4%, scar 20%" in stall
    assert "16 saves, one every 2 steps; with blocks by turns and no refresh it would be 9.0." in stall
    assert "one every 2 steps, taken to one every 40; with blocks by turns and no refresh it would be 161.0." in loop
    assert "slowed" not in loop


def test_conclusions_tell_where_scar_does_not_pay() -> None:
    _, loop = conclusions(figures(after_save=8.0))
    assert "SCAR does not pay, async loses least; a crash costs, in steps: scar 341.0, async 208.0" in loop


@pytest.mark.parametrize(("after_save", "is_met"), [(2.0, True), (8.0, False)])
def test_targets_are_to_lose_less_than_the_best_other_and_to_add_little(after_save: float, is_met: bool) -> None:
    found = targets({"gpt_5m": figures(after_save)["gpt"], "conclusions": ["said"]})
    assert [aim.met for aim in found] == [True, is_met, True]
    assert found[1].value == pytest.approx((20 + 1 + 40 * after_save) / 208)
    assert (found[2].value, found[2].limit) == pytest.approx((0.04, 0.25))


def test_a_longer_stretch_is_compared_with_as_many_usual_steps() -> None:
    usual, long = Stretch(None, 2, wall=2.0, idle=0.2, forward_backward=0.5), Stretch("dcp", 5, 6.5, 0.8, 0.5)
    assert added([usual, long, usual], "dcp") == pytest.approx([1.5])
    assert blocked([usual, long, usual], "dcp") == pytest.approx([0.3])


@pytest.mark.timeout(300)
def test_a_quick_run_measures_all_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    found: dict[str, Any] = json.loads(json.dumps(measure(quick=True, folder=tmp_path, rounds=2)))
    assert torch.get_num_threads() == threads
    (of_model,) = found.values()
    costs = of_model["costs"]
    assert {(row["kind"], row["method"]) for row in of_model["rows"]} == {(k, m) for k in KINDS for m in METHODS}
    for row in of_model["rows"]:
        assert row["overhead"] <= 0.01 * (1 + 1e-9)
        assert row["interval"] >= costs[row["method"]]["steps"]
        assert row["rework"] > 0
    assert all(each["saves"] == 16 and each["steps"] > 0 for each in of_model["estimates"])
    # A partial save writes an eighth of the tensors, beside a skeleton; all others write all of them.
    assert 0.1 < costs["scar"]["bytes"] / of_model["state_bytes"] < 0.2
    assert all(costs[method]["bytes"] > of_model["state_bytes"] for method in METHODS - {"scar"})
    assert all(0 <= cost["stall"] <= cost["loop"] and cost["written"] > 0 for cost in costs.values())
    show(found)
    printed = capsys.readouterr().out
    assert all(method in printed for method in METHODS)
    assert len(conclusions(found)) == len(KINDS)
