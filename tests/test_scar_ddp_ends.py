"""How trainings with ``strategy="scar_ddp"`` end: by signals, by too many failures, before they begin; and resume."""

import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import TinyModel, assert_same, loader, make_trainer, saver
from lightning.fabric.utilities.exceptions import MisconfigurationException
from prepared import multiprocessing_context
from scar_ddp_runs import DOORS, REFERENCE, Training, assert_done, reference, train
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_scar import SCARDDPStrategy, load
from lightning_scar.core.restoration import restore
from lightning_scar.elastic.protocol.log import Events, Notices
from lightning_scar.elastic.protocol.messages import Formed, Generation
from lightning_scar.elastic.supervisor.wakeups import Wakeups
from lightning_scar.storage.store import DeltaStore

SCAR = {"every_n_train_steps": 4, "fraction": 0.5}


in_each_door = pytest.mark.parametrize("door", DOORS)


def saved_state(training: Training) -> dict[str, Any]:
    """What :func:`load` finds, of what a result holds."""
    checkpoint = load(training.folder / "scar")
    names = {"state_dict": "state_dict", "optimizer_states": "optimizer_states", "schedules": "lr_schedulers"}
    return {name: checkpoint[key] for name, key in names.items()}


def last_steps(training: Training) -> set[int]:
    return {max(step["step"] for step in training.steps if step["slot"] == slot) for slot in (0, 1)}


# -- signals to the supervisor ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "code", "door"),
    [
        pytest.param("terminate the job", 143, "Trainer", marks=pytest.mark.slow),
        pytest.param("interrupt the job", 130, "Trainer", marks=pytest.mark.slow),
        pytest.param("terminate the job", 143, "Accelerate", marks=pytest.mark.slow),
        ("interrupt the job", 130, "Accelerate"),
    ],
)
def test_a_signal_stops_all_behind_one_step_and_the_next_start_resumes(
    tmp_path: Path, how: str, code: int, door: str
) -> None:
    options: dict[str, Any] = {"scar": SCAR, "trainer": {"max_epochs": 15, "limit_val_batches": 0}, "door": door}
    stopped = train(tmp_path, ("training_step", 5, 1, how), **options)
    assert stopped.code == code, stopped.console
    assert not stopped.results
    (step,) = last_steps(stopped)
    assert step < 180
    assert load(tmp_path / "scar")["global_step"] == step
    assert {version.step for version in restore(DeltaStore(tmp_path / "scar")).plan.versions.values()} == {step}
    # The fault is behind it.
    resumed = train(tmp_path, ("training_step", 5, 1, how), **options)
    assert_done(resumed, steps=180)
    assert_same(saved_state(resumed), resumed.state)


@pytest.mark.parametrize("door", ["Trainer", pytest.param("Accelerate", marks=pytest.mark.slow)])
def test_a_pool_of_forked_processes_that_ends_does_not_end_the_job(tmp_path: Path, door: str) -> None:
    training = train(tmp_path, ("training_step", 4, 0, "pool"), door=door)
    assert_done(training, steps=24)
    assert training.outages(1) == []


@pytest.mark.parametrize(
    ("how", "code"),
    [("terminate the job", 143), pytest.param("interrupt the job", 130, marks=pytest.mark.slow)],
)
@in_each_door
def test_a_signal_behind_the_training_ends_the_script_whatever_it_does(
    tmp_path: Path, how: str, code: int, door: str
) -> None:
    """It does not wait for a step that nobody makes until it is killed, which is later than this test is over."""
    faults = [("end", 0, 0, f"{how} and wait"), ("end", 0, 1, "wait")]
    training = train(tmp_path, *faults, scar=SCAR, run=["--stop-timeout", "100"], door=door, limit=60)
    assert training.code == code, training.console
    assert not training.results
    assert load(tmp_path / "scar")["global_step"] == 24


# -- with a running checkpoint ---------------------------------------------------------------------------------------


@in_each_door
def test_the_running_checkpoint_goes_on_in_a_replacement(tmp_path: Path, door: str) -> None:
    training = train(tmp_path, ("backward", 6, 0, "kill"), scar=SCAR, door=door)
    assert_done(training, steps=24)
    assert_same(saved_state(training), training.state)


@pytest.mark.parametrize(
    "door",
    ["Trainer", pytest.param("Accelerate", marks=pytest.mark.slow), pytest.param("Fabric", marks=pytest.mark.slow)],
)
def test_when_every_worker_dies_the_running_checkpoint_is_what_is_left(tmp_path: Path, door: str) -> None:
    # Lightning's own loaders cannot begin in the middle of an epoch.
    faults = [("training_step", 13, 0, "kill"), ("training_step", 13, 1, "kill")]
    training = train(tmp_path, *faults, scar={"every_n_train_steps": 12, "fraction": 1.0}, **REFERENCE, door=door)
    assert training.code == 0, training.console
    assert [result["global_step"] for result in training.results.values()] == [36, 36]
    assert_same(training.state["state_dict"], reference(door=door)["state_dict"])
    assert "esuming from the running checkpoint" in training.console


def test_a_job_that_dies_behind_its_training_makes_only_the_rest_again(tmp_path: Path) -> None:
    """In the same job, in which nobody is left with a state in memory, and when it is put in the queue again."""
    faults = [("test", 0, 0, "kill"), ("test", 0, 1, "kill")]
    first = train(tmp_path, *faults, scar=SCAR, test=True)
    again = train(tmp_path, *faults, scar=SCAR, test=True)
    for training in (first, again):
        assert_done(training, steps=24)
        assert "holds a finished run: step 24" in training.console
        assert_same(saved_state(training), training.state)
        assert_same(dict(training.results[0]["fitted"]), dict(training.state["state_dict"]))
        assert training.results[0]["tested"] == first.results[1]["tested"]


@pytest.mark.slow
def test_a_job_that_dies_behind_its_loop_makes_only_the_rest_again(tmp_path: Path) -> None:
    faults = [("end", 0, 0, "kill"), ("end", 0, 1, "kill")]
    for _ in range(2):
        training = train(tmp_path, *faults, scar=SCAR, door="Accelerate")
        assert_done(training, steps=24)
        assert "holds a finished run: step 24" in training.console
        assert_same(saved_state(training), training.state)


@in_each_door
def test_a_single_worker_is_started_again(tmp_path: Path, door: str) -> None:
    faults = [("training_step", 10, 0, "kill")]
    how: dict[str, Any] = {"run": None} if door == "Trainer" else {}
    training = train(tmp_path, *faults, ranks=1, scar=SCAR, door=door, **how)
    assert training.code == 0, training.console
    assert training.results[0]["global_step"] == 48
    assert "esuming from the running checkpoint" in training.console


# -- too many failures -----------------------------------------------------------------------------------------------


@in_each_door
def test_without_restarts_the_others_save_and_the_cause_is_shown(tmp_path: Path, door: str) -> None:
    how: dict[str, Any] = {"strategy": {"max_restarts": 0}, "run": None}
    if door != "Trainer":
        how = {"run": ["--max-restarts", "0"]}
    training = train(tmp_path, ("training_step", 5, 1, "error"), scar=SCAR, door=door, **how)
    assert training.code == 1
    assert not training.results
    before, _, report = training.console.partition("lightning-scar: the job failed: ")
    assert "the job failed" not in before
    assert report.startswith("rank 1 exited with code 1.")
    assert "ValueError: a bug of this rank alone" in report
    assert "--max-restarts is 0" in report
    assert load(tmp_path / "scar")["global_step"] == 6


@in_each_door
def test_a_group_that_fails_again_and_again_though_nobody_dies_ends_the_job(tmp_path: Path, door: str) -> None:
    """As with a device whose error does not go away. It is no endless loop, and what there is is saved."""
    faults = [("training_step", 5, 0, "disconnect")] * 9
    training = train(tmp_path, *faults, scar=SCAR, door=door, run=["--max-restarts", "2"])
    assert training.code == 1, training.console
    assert not training.results
    assert training.console.count("; it forms again") == 2
    report = training.console.partition("lightning-scar: the job failed: ")[2]
    assert report.startswith("the group failed, though no worker died.\nAll workers live, but cannot work together")
    assert "    rank 0: gloo: this rank alone has lost the connection\n" in report
    assert load(tmp_path / "scar")["global_step"] == 5
    assert len(training.processes) == 2


@in_each_door
def test_with_fewer_workers_than_min_world_size_they_save_and_stop(tmp_path: Path, door: str) -> None:
    faults = [("training_step", 11, 0, "kill")]
    training = train(tmp_path, *faults, strategy={"min_world_size": 2}, scar=SCAR, door=door)
    assert training.code == 1
    assert not training.results
    assert "1 workers are left, fewer than min_world_size=2" in training.console
    assert load(tmp_path / "scar")["global_step"] == 11


# -- what cannot be started ------------------------------------------------------------------------------------------


def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    training = train(tmp_path, model={"manual": True}, run=["--max-restarts", "0"])
    assert training.code == 1
    assert "cannot continue after a failure with manual optimization" in training.console
    assert not training.steps


def test_a_program_that_is_no_script_is_refused(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); del sys.argv[0]; import scar_ddp_training as t; t.main()"
    training = train(tmp_path, command=[sys.executable, "-c", code])
    assert training.code == 1
    assert "it must be a script" in training.console
    assert "lightning-scar run --nproc-per-node 2" in training.console


def test_a_call_from_pytest_is_refused() -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="scar_ddp", logger=False, enable_checkpointing=False)
    with pytest.raises(MisconfigurationException, match="must be a script"):
        trainer.fit(TinyModel(), loader())


def test_a_process_that_is_not_the_first_does_not_become_a_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=4, strategy="scar_ddp", logger=False, enable_checkpointing=False)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(MisconfigurationException, match="this one has local rank 2"):
        trainer.fit(TinyModel(), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_failure": "pray"}, "on_failure='pray' is not one of 'cover', 'shrink', 'buffer', 'wait'"),
        ({"flush": "all"}, "flush='all' is not one of"),
        ({"min_world_size": 0}, "min_world_size=0 must be at least 1"),
        ({"max_staleness": -1}, "max_staleness=-1 must not be negative"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SCARDDPStrategy(**options)


# -- a supervisor that is gone -----------------------------------------------------------------------------------------


def _supervise(mouth: Connection) -> None:
    """The store of a supervisor that has one worker."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    Events.create(store)
    Notices(store).append(Formed(Generation(0, {0: 0}, source=0)))
    wakeups = Wakeups()
    mouth.send((store.port, wakeups.port))
    while True:
        wakeups.wait(100)


class Counts(TinyModel):
    """Counts its batches behind each."""

    def __init__(self, supervisor: int = 0) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.supervisor = supervisor

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 3 and self.supervisor:
            os.kill(self.supervisor, signal.SIGKILL)
            deadline = time.monotonic() + 40
            while not self.trainer.strategy._member.is_broken and time.monotonic() < deadline:  # type: ignore[attr-defined]
                time.sleep(0.01)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        self.count += 1


def _work(folder: Path, supervisor: int, port: int, doorbell: int, mouth: Connection) -> None:
    fields = {"STORE": f"127.0.0.1:{port}", "SLOT": 0, "SPAWN": 0, "GENERATION": 0, "DOORBELL": doorbell}
    os.environ.update({f"LIGHTNING_SCAR_{name}": str(value) for name, value in fields.items()})
    os.environ.update(
        WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", GLOO_SOCKET_IFNAME="lo", LIGHTNING_SCAR_STATE=str(folder)
    )
    torch.set_num_threads(1)
    scar = saver(folder / "scar", fraction=1.0, full_every_n_saves=1, every_n_train_steps=100, save_on_exception=True)
    trainer = make_trainer(scar, strategy="scar_ddp", max_epochs=1)
    try:
        trainer.fit(Counts(supervisor), loader())
    except BaseException as error:
        mouth.send(f"{type(error).__name__}: {error}")
    os._exit(0)


def test_hooks_of_the_last_batch_are_called_where_the_supervisor_is_gone(tmp_path: Path) -> None:
    context = multiprocessing_context()
    ear, mouth = context.Pipe(duplex=False)
    supervisor = context.Process(target=_supervise, args=(mouth,), daemon=True)
    supervisor.start()
    port, doorbell = ear.recv()
    worker = context.Process(target=_work, args=(tmp_path, supervisor.pid, port, doorbell, mouth), daemon=True)
    worker.start()
    try:
        assert ear.poll(60)
        assert "the supervisor is gone" in ear.recv()
    finally:
        for process in (worker, supervisor):
            process.kill()
            process.join()
    saved = load(tmp_path / "scar")
    assert (saved["global_step"], saved["state_dict"]["count"]) == (4, 4)
    make_trainer(saver(tmp_path / "scar"), max_epochs=1).fit(model := Counts(), loader())
    assert model.count == 8
