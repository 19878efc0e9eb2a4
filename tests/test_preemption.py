"""Signals end a job: in each phase, once and twice, in each front door. Real processes, real signals."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same
from scar_ddp_runs import Fault, Training, train

from lightning_scar import load

SCAR = {"every_n_train_steps": 1000, "fraction": 1.0}
#: Where a signal comes: in which hook, at which number, and at which steps it may be saved at the earliest.
PHASES: dict[str, tuple[str, int, int | None]] = {
    "start-up": ("setup", 0, None),
    "sanity check": ("sanity check", 0, None),
    "forward": ("training_step", 5, 6),
    "optimizer step": ("before_step", 5, 6),
    "validation": ("validation", 0, 12),
    "save": ("save", 4, 4),
    "test": ("test", 0, 24),
}
#: How a job is started, with how many ranks, and what gets the signal.
WAYS: dict[str, dict[str, Any]] = {
    "one process": {"ranks": 1, "strategy": "ddp", "run": None},
    "ddp": {"ranks": 2, "strategy": "ddp", "run": None},
    "scar_ddp": {"ranks": 2},
    "a loop": {"ranks": 1, "strategy": "ddp", "run": None, "door": "Accelerate"},
    "a continued loop": {"ranks": 2, "door": "Accelerate"},
}
#: Of what each of the others is one more example.
CHOSEN = {
    ("SIGTERM", "forward", "one process"),
    ("SIGINT twice", "optimizer step", "one process"),
    ("SIGTERM twice", "validation", "one process"),
    ("SIGINT", "sanity check", "one process"),
    ("SIGTERM", "test", "one process"),
    ("SIGTERM twice", "forward", "ddp"),
    ("SIGTERM", "validation", "scar_ddp"),
    ("SIGINT twice", "forward", "scar_ddp"),
    ("SIGTERM", "test", "scar_ddp"),
    ("SIGINT", "forward", "a loop"),
    ("SIGTERM twice", "optimizer step", "a continued loop"),
}


def cells() -> list[Any]:
    """What there is: loops have no sanity check, no hook of a save and no test."""
    found = []
    for name in ("SIGTERM", "SIGTERM twice", "SIGINT", "SIGINT twice"):
        for phase in PHASES:
            for way in WAYS:
                if "loop" in way and phase in ("sanity check", "save", "test"):
                    continue
                marks = [] if (name, phase, way) in CHOSEN else [pytest.mark.slow]
                found.append(pytest.param(name, phase, way, marks=marks, id=f"{name}, {phase}, {way}"))
    return found


def end(folder: Path, how: str, phase: str, way: str, **more: Any) -> Training:
    where, number, _ = PHASES[phase]
    scar = {**SCAR, "every_n_train_steps": 4} if phase == "save" else SCAR
    options: dict[str, Any] = {"scar": scar, "test": phase == "test", **WAYS[way], **more}
    one_process = options["ranks"] == 1
    faults: list[Fault] = [(where, number * (2 if one_process and where == "validation" else 1), 0, how)]
    if options["ranks"] == 2:
        faults = [(where, number, rank, how) for rank in (0, 1)]
    return train(folder, *faults, limit=60, **options)


@pytest.mark.parametrize(("how", "phase", "way"), cells())
def test_a_signal_ends_a_job_with_a_full_save_and_the_code_that_schedulers_expect(
    tmp_path: Path, how: str, phase: str, way: str
) -> None:
    number = signal.Signals[how.split()[0]]
    training = end(tmp_path, how, phase, way)
    # Lightning itself ends what Ctrl-C interrupts in its start-up.
    is_lightnings = number == signal.SIGINT and phase == "start-up" and way in ("one process", "ddp")
    assert training.code in ([1] if is_lightnings else [128 + number, -number]), training.console
    assert not training.results or phase == "test"
    least = PHASES[phase][2]
    if least is None:
        assert not list((tmp_path / "scar").glob("rank-*"))
        return
    made = max(step["step"] for step in training.steps)
    assert made >= least
    saved = load(tmp_path / "scar", consistent=True)
    assert saved["global_step"] == made, training.console
    assert made <= 2 * least + 12, "it went on for long"


@pytest.mark.slow
def test_a_rank_that_is_told_a_step_before_rank_0_saves_that_of_rank_0_too(tmp_path: Path) -> None:
    """Rank 0 is told in its save, and tells the other one, which has not come to that yet."""
    scar = {**SCAR, "every_n_train_steps": 4}
    faults: list[Fault] = [("batch_end", 3, 1, "a moment"), ("save", 4, 0, "SIGTERM")]
    training = train(tmp_path, *faults, scar=scar, limit=60, **WAYS["ddp"])
    assert training.code in (143, -15), training.console
    assert [save["step"] for save in training.saves if save["full"] and save["slot"] == 1][:2] == [4, 5]
    assert load(tmp_path / "scar", consistent=True)["global_step"] == 5


@pytest.mark.parametrize("way", ["one process", pytest.param("scar_ddp", marks=pytest.mark.slow)])
def test_what_a_signal_ended_in_a_validation_resumes_as_if_nothing_had_been(tmp_path: Path, way: str) -> None:
    options = {"model": {"rich": True}, "scar": SCAR, "limit": 60, **WAYS[way]}
    end(tmp_path / "ended", "SIGTERM", "validation", way, model=options["model"])
    resumed = train(tmp_path / "ended", **options)
    whole = train(tmp_path / "whole", **options)
    assert (resumed.code, whole.code) == (0, 0), resumed.console
    assert_same(resumed.state, whole.state)
    assert_same(resumed.results[0]["metrics"], whole.results[0]["metrics"])


@pytest.mark.parametrize("how", ["SIGUSR1", pytest.param("SIGUSR1 twice", marks=pytest.mark.slow)])
@pytest.mark.parametrize("phase", ["forward", pytest.param("validation", marks=pytest.mark.slow)])
def test_slurms_signal_saves_and_requeues_and_training_goes_on(
    tmp_path: Path, how: str, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's handler requeues, with our save in the place of its own; then SLURM ends the job."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/requeued\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for name, value in {"JOB_ID": 7, "NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_NAME": "train"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    where, number, _ = PHASES[phase]
    training = train(tmp_path, (where, number, 0, how), ranks=1, strategy="auto", run=None, scar=SCAR, limit=60)
    assert training.code == 0, training.console
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert not list(tmp_path.glob("hpc_ckpt*"))
    assert [save["step"] for save in training.saves if save["full"]] == [6 if phase == "forward" else 25, 48]


def test_slurms_signal_ends_what_lightning_does_not_requeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop, and a supervisor: they would die of it."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for way in ("a loop", "scar_ddp"):
        training = end(tmp_path / way, "SIGUSR1", "forward", way)
        assert training.code in (128 + signal.SIGUSR1, -signal.SIGUSR1), training.console
        made = max(step["step"] for step in training.steps)
        assert load(tmp_path / way / "scar", consistent=True)["global_step"] == made
