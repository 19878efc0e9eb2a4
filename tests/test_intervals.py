"""Saves as often as time, or what they cost, allows: the same steps on all ranks."""

import logging
import re
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import ddp_runs
import lightning.pytorch as pl
import loop_runs
import pytest
import torch
from ddp_runs import SMALL, Patient, Poison, Run
from helpers import TinyModel, assert_same, cut_short, fit, loader, saver
from ranks import run_ranks
from scar_ddp_runs import assert_done, train
from test_healing import is_finite

from lightning_scar import SCARLoop, load
from lightning_scar.core.selection import Candidates, distance
from lightning_scar.storage.directory import Directory

TOLD = re.compile(
    r"lightning-scar: a save costs (\S+) s, a step takes (\S+) s: saving every (\d+ )?steps?, for \S+ % of"
)


class Steady(TinyModel):
    """Its steps take 5 ms."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.005)
        return super().training_step(batch, batch_idx)


def slow(candidates: Candidates) -> torch.Tensor:
    time.sleep(0.05)
    return distance(candidates)


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[float, float, int]]:
    """Cost, seconds of a step, and steps, each time it was said."""
    found = map(TOLD.match, caplog.messages)
    return [(float(m[1]), float(m[2]), int(m[3] or 1)) for m in found if m is not None]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    return caplog


# -- by cost -------------------------------------------------------------------------------------------------------


def test_a_directory_is_enough(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    scar = saver(tmp_path, max_overhead=None)
    assert scar._schedule.max_overhead == 0.01
    model = fit(scar, model=Steady(), data=loader(60))
    # The first save comes at once, the second when it is known what a step takes, and some more until it is sure.
    assert 3 <= scar.stats.saves < 30
    assert scar.stats.skipped_saves == 0
    cost, step, steps = told(said)[0]
    assert step >= 0.005
    assert steps == pytest.approx(cost / 0.01 / step, rel=0.15)
    assert_same(load(tmp_path)["state_dict"], model.live[120]["state_dict"])


def test_what_stalls_is_done_less_often(memory_url: str, said: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"max_overhead": 0.2, "staging": "eager"}
    cheap = saver(f"{memory_url}/cheap", **options)
    expensive = saver(f"{memory_url}/expensive", policy=slow, **options)
    fit(cheap, model=Steady(), data=loader(150), max_epochs=1)
    said.clear()
    began = time.monotonic()
    fit(expensive, model=Steady(), data=loader(150), max_epochs=1)
    seconds = time.monotonic() - began
    assert cheap.stats.saves > expensive.stats.saves
    # Besides the first, the one that is measured first and the last.
    assert (expensive.stats.saves - 3) * 0.05 <= 0.2 * seconds
    cost, step, steps = told(said)[0]
    assert cost >= 0.05
    assert steps == pytest.approx(cost / 0.2 / step, rel=0.1, abs=1.5)


def test_writing_that_slows_steps_down_counts(
    memory_url: str, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Directory.write

    def busily(self: Directory, name: str, pieces: Any) -> None:
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            pass  # and no other thread runs
        write(self, name, pieces)

    monkeypatch.setattr(Directory, "write", busily)
    scar = saver(memory_url, max_overhead=0.2)
    fit(scar, model=Steady(), data=loader(200), max_epochs=1)
    cost, _, _ = told(said)[-1]
    assert cost > 0.03


def test_no_save_begins_while_another_is_written(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[float] = []
    write = Directory.write

    def slowly(self: Directory, name: str, pieces: Any) -> None:
        if name.endswith(".safetensors"):
            began.append(time.monotonic())
            time.sleep(0.1)
        write(self, name, pieces)

    monkeypatch.setattr(Directory, "write", slowly)
    scar = saver(memory_url, max_overhead=0.9)
    cut_short(scar, model=Steady(), data=loader(100), after=100, max_epochs=2)
    assert scar.stats.skipped_saves == 0
    assert len(began) > 3
    assert all(b - a > 0.1 for a, b in pairwise(began))


def test_a_validation_is_no_cost_of_a_save(memory_url: str, said: pytest.LogCaptureFixture) -> None:
    class Validates(Steady):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            time.sleep(0.2)

    scar = saver(memory_url, max_overhead=0.5)
    options = {"val_check_interval": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    fit(scar, model=Validates(), data=Both(), max_epochs=1, **options)
    assert scar.stats.saves > 3
    assert max(cost for cost, *_ in told(said)) < 0.1


class Both(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader(36)

    def val_dataloader(self) -> Any:
        return loader(1)


def test_saves_that_cannot_be_written_cost_no_more_than_others(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    scar = saver(tmp_path / "file" / "scar", max_overhead=0.01)
    with pytest.warns(UserWarning, match="cannot be written to"):
        fit(scar, model=Steady(), data=loader(60), max_epochs=1)
    # All are full, for none is there to add to; two tell what they cost.
    assert 3 <= scar.stats.full_saves == scar.stats.saves < 15


def test_a_long_time_is_not_over_at_once(tmp_path: Path) -> None:
    options = {**SMALL, "train_time_interval": timedelta(hours=1)}
    runs = run_ranks(ddp_runs.train, 2, tmp_path, scar=options, after=20, data=ddp_runs.long, max_epochs=1)
    assert [run.stats["saves"] for run in runs] == [0, 0]


def test_full_saves_count_in_the_cost(memory_url: str) -> None:
    scar = saver(memory_url, max_overhead=0.5, full_every_n_saves=3, fraction=0.3, block_size=64)
    model = cut_short(scar, model=Steady(), data=loader(60), after=59, max_epochs=2)
    assert scar.stats.full_saves >= scar.stats.saves // 3 > 1
    consistent = load(memory_url, consistent=True)
    assert_same(consistent["state_dict"], model.live[consistent["global_step"]]["state_dict"])


def test_a_loop_says_what_it_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.Adam(model.parameters())
    with SCARLoop(tmp_path, {"model": model, "optimizer": optimizer}) as scar:
        for _ in range(scar.resume(), 120):
            time.sleep(0.002)
            model(torch.randn(2, 8)).square().mean().backward()
            optimizer.step()
            scar.step()
    lines = [line for line in capsys.readouterr().err.splitlines() if TOLD.match(line)]
    assert 1 <= len(lines) <= 4
    assert lines[0].endswith("(max_overhead=0.01)")


# -- on several ranks ----------------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "cost": {"max_overhead": 0.5},
    "time": {"train_time_interval": timedelta(seconds=0.05)},
}


def saves(runs: list[Run]) -> list[list[float]]:
    return [[row["scar/step"] for row in run.logged] for run in runs]


@pytest.mark.parametrize("mode", MODES)
def test_all_ranks_save_at_the_same_steps(tmp_path: Path, mode: str) -> None:
    options = {**SMALL, **MODES[mode], "full_every_n_saves": 2}
    runs = run_ranks(ddp_runs.train, 2, tmp_path, Patient(), scar=options, after=62, data=ddp_runs.long, max_epochs=1)
    first, second = saves(runs)
    assert first == second
    assert len(first) >= 3
    assert [run.stats["full_saves"] for run in runs] == [runs[0].stats["full_saves"]] * 2
    assert runs[0].stats["full_saves"] >= 2
    consistent = load(tmp_path, consistent=True)
    assert consistent["global_step"] in [*first, runs[0].stats["step"]]
    assert_same(consistent["state_dict"], runs[0].live[consistent["global_step"]]["state_dict"])


@pytest.mark.parametrize("mode", MODES)
def test_all_ranks_heal_at_the_same_step(tmp_path: Path, mode: str) -> None:
    options = {**SMALL, **MODES[mode], "full_every_n_saves": None, "heal_non_finite": True}
    poison = Poison(30, ranks=(1,))
    runs = run_ranks(ddp_runs.train, 2, tmp_path, poison, scar=options, data=ddp_runs.long, max_epochs=1)
    for run in runs:
        assert run.error is None
        assert run.stats["heals"] == 1
        assert is_finite(run.final)
    assert_same(runs[0].final["state_dict"], runs[1].final["state_dict"])


@pytest.mark.parametrize("mode", MODES)
def test_all_ranks_of_a_loop_save_at_the_same_steps(tmp_path: Path, mode: str) -> None:
    options = {"every_n_steps": None, **MODES[mode], "fraction": 0.5}
    runs = run_ranks(loop_runs.train, 2, tmp_path, scar=options, after=63, epochs=8)
    assert [run.error for run in runs] == [None, None]
    steps = [run.stats["step"] for run in runs]
    assert steps[0] == steps[1] > 0
    assert load(tmp_path, consistent=True)["global_step"] <= steps[0]


@pytest.mark.parametrize(
    ("door", "slot", "mode", "on_failure"),
    [
        ("Trainer", 0, {"max_overhead": 0.5}, "shrink"),
        pytest.param("Trainer", 1, {"train_time_interval": 0.02}, "shrink", marks=pytest.mark.slow),
        # A loop might be over before the replacement is there.
        pytest.param("Accelerate", 0, {"train_time_interval": 0.02}, "wait", marks=pytest.mark.slow),
        pytest.param("Accelerate", 1, {"max_overhead": 0.5}, "wait", marks=pytest.mark.slow),
    ],
)
def test_a_survivor_and_a_replacement_agree(
    tmp_path: Path, door: str, slot: int, mode: dict[str, float], on_failure: str
) -> None:
    options: dict[str, Any] = {
        "strategy": {"on_failure": on_failure},
        "scar": {**mode, "fraction": 0.5, "full_every_n_saves": 4},
        "trainer": {"max_epochs": 20, "limit_val_batches": 0},
    }
    training = train(tmp_path, ("backward", 30, slot, "kill"), door=door, **options)
    assert_done(training, steps=240)
    lines = training.saves
    (joined,) = {outage["step"] for outage in training.outages(1 - slot)}
    begun = min(line["step"] for line in lines if line["slot"] == slot and line["step"] > joined + 1)
    # The dead one may have been told of a save that it did not live to make.
    both = [{(s["step"], s["full"]) for s in lines if s["slot"] == each and s["step"] >= begun} for each in (0, 1)]
    assert both[0] == both[1]
    assert len(both[0]) > 5
    before = [{s["step"] for s in lines if s["slot"] == each and s["step"] < joined} for each in (0, 1)]
    assert before[0] == before[1]
    assert load(tmp_path / "scar", consistent=True)["global_step"] == 240
