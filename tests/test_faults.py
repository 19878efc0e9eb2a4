"""Real processes, killed by real signals.

A server that has imported everything forks them, so that each starts in a moment.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import fault_runs
import loop_runs
import pytest
import torch
from helpers import TinyModel, assert_same, cut_short, fit, saver
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lived import Saved, assert_as_lived
from prepared import multiprocessing_context
from torch import Tensor

from lightning_scar import load
from lightning_scar.core.restoration import NoCheckpointError
from lightning_scar.storage.host_memory import VARIABLE
from lightning_scar.storage.lease import DirectoryInUseError

Start = Callable[..., BaseProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    context = multiprocessing_context()
    started: list[BaseProcess] = []

    def start(target: Callable[..., None], *args: Any, **kwargs: Any) -> BaseProcess:
        process = context.Process(target=target, args=args, kwargs=kwargs)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join(10)


def wait_until(condition: Callable[[], bool], process: BaseProcess, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), f"the process ended by itself, with {process.exitcode}"
        assert time.monotonic() < deadline, "the process is too slow"
        time.sleep(0.001)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def kill(process: BaseProcess, signum: int = signal.SIGKILL, seconds: float = 60) -> int | None:
    assert process.pid is not None
    os.kill(process.pid, signum)
    process.join(seconds)
    return process.exitcode


def finished(process: BaseProcess, seconds: float = 60) -> int | None:
    process.join(seconds)
    return process.exitcode


# -- SIGKILL -------------------------------------------------------------------------------------------------------


def step_on_disk(dirpath: Path) -> int:
    try:
        return load(dirpath)["global_step"]
    except NoCheckpointError:
        return 0


def assert_blocks_as_written_down(dirpath: Path, days: dict[int, dict[str, Tensor]]) -> None:
    def lived(saved: Saved, step: int) -> Tensor:
        name = saved.key.removeprefix("state_dict/").split("[")[0]
        slot = "param" if saved.path[0] == "state_dict" else saved.path[-1]
        values = days[step][f"{name}/{slot}"][saved.span]
        assert bool(values.isfinite().all()), saved.key
        return values

    assert_as_lived(dirpath, lived)


#: The same training through each front door.
WRITE_DIARY = {"Trainer": fault_runs.write_diary, "Accelerate": loop_runs.write_diary}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("door", WRITE_DIARY)
def test_kills_in_a_row_lose_next_to_nothing(
    start: Start, tmp_path: Path, door: str, memory: bool, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "host").mkdir()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "host"))
    options = {"host": tmp_path / "host", "durable_every_n_saves": 5} if memory else {}
    dirpath, chance = tmp_path / "scar", random.Random(7)
    days: dict[int, dict[str, Tensor]] = {}
    resumed_from = reached = lived = 0
    for i in range(kills):
        diary = tmp_path / f"diary-{i}"
        process = start(WRITE_DIARY[door], dirpath, diary, **options)
        days_to_live = chance.randrange(20)
        lived += days_to_live
        enough = 4 * fault_runs.DIARY_FLOATS * days_to_live
        wait_until(lambda diary=diary, enough=enough: size(diary) >= enough, process)
        time.sleep(chance.random() * (0.01 if days_to_live else 0.5))
        assert kill(process) == -signal.SIGKILL
        written = fault_runs.read_diary(diary)
        if written:
            assert min(written) == resumed_from + 1, "the run did not go on from what was on disk"
        # Where a run repeats a step, the older blocks of that step were of saves that never came to be.
        days.update(written)
        if step_on_disk(dirpath):
            assert_blocks_as_written_down(dirpath, days)
        assert step_on_disk(dirpath) >= resumed_from, "the running checkpoint went backwards"
        resumed_from, reached = step_on_disk(dirpath), max(days, default=0)
    assert resumed_from > lived / 3
    assert reached >= resumed_from
    process = start(WRITE_DIARY[door], dirpath, tmp_path / "last", max_steps=resumed_from + 10, **options)
    assert finished(process) == 0
    assert step_on_disk(dirpath) == resumed_from + 10
    assert not list(dirpath.rglob("*.tmp"))
    assert not list(tmp_path.glob("host/*/*"))


def test_a_fresh_run_killed_in_its_first_save_leaves_the_older_run_as_it_was(start: Start, tmp_path: Path) -> None:
    older = cut_short(saver(tmp_path / "scar", full_every_n_saves=1), after=6)
    process = start(fault_runs.hang_in_the_first_save, tmp_path / "scar", tmp_path / "marker")
    wait_until((tmp_path / "marker").exists, process)
    kill(process)
    assert list((tmp_path / "scar").rglob("*.tmp")), "the kill came too early or too late"
    assert_same(load(tmp_path / "scar")["state_dict"], older.live[6]["state_dict"])
    resumed = fit(saver(tmp_path / "scar"))
    assert min(resumed.live) == 7
    assert not list((tmp_path / "scar").rglob("*.tmp"))


@pytest.mark.parametrize("door", WRITE_DIARY)
def test_a_live_run_keeps_its_directory_and_a_killed_one_does_not(start: Start, tmp_path: Path, door: str) -> None:
    process = start(WRITE_DIARY[door], tmp_path / "scar", tmp_path / "diary")
    wait_until(lambda: step_on_disk(tmp_path / "scar") > 0, process)
    with pytest.raises(DirectoryInUseError, match=f"in use by process {process.pid} "):
        WRITE_DIARY[door](tmp_path / "scar", tmp_path / "second")
    kill(process)
    assert (tmp_path / "scar" / "lease.json").exists()
    WRITE_DIARY[door](tmp_path / "scar", tmp_path / "third", max_steps=step_on_disk(tmp_path / "scar") + 2)
    assert fault_runs.read_diary(tmp_path / "third")
    assert not (tmp_path / "scar" / "lease.json").exists()


# -- SIGTERM and Ctrl-C --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_lost_when_a_process_is_told_to_stop(
    start: Start, tmp_path: Path, options: dict[str, Any], signum: signal.Signals
) -> None:
    process = start(fault_runs.train_counted, tmp_path / "scar", tmp_path / "count", tmp_path / "seen", **options)
    wait_until(lambda: size(tmp_path / "count") >= 5, process)
    assert kill(process, signum) == 128 + signum, "batch systems look at it"
    resumed = fit(saver(tmp_path / "scar"), data=fault_runs.stateful(), max_epochs=4, **options)
    whole = fit(saver(tmp_path / "whole"), data=fault_runs.stateful(), max_epochs=4, **options)
    first = torch.load(tmp_path / "seen")
    assert 5 <= len(first) < 32
    assert first + resumed.seen == whole.seen
    for part in ("state_dict", "optimizer_states", "global_step"):
        assert_same(resumed.final[part], whole.final[part])


@pytest.mark.parametrize("accumulates", [1, 3])
def test_nothing_is_lost_when_a_loop_is_told_to_stop(start: Start, tmp_path: Path, accumulates: int) -> None:
    options = {"accumulates": accumulates}
    process = start(loop_runs.train_counted, tmp_path / "scar", tmp_path / "count", tmp_path / "seen", **options)
    wait_until(lambda: size(tmp_path / "count") >= 5, process)
    # As if nobody had taken the signal up: batch systems look at it.
    assert kill(process, signal.SIGTERM) == -signal.SIGTERM
    made, way = size(tmp_path / "count"), "Adam" if accumulates == 1 else "accumulated gradients"
    resumed = loop_runs.train(0, tmp_path / "scar", way=way, epochs=4)
    whole = loop_runs.train(0, tmp_path / "whole", way=way, epochs=4)
    assert whole.seen[made:] == resumed.seen, "it did not stop behind a step"
    for part in ("state_dict", "optimizer_states", "global_step"):
        assert_same(resumed.final[part], whole.final[part])


@pytest.mark.parametrize("hook", ["validation", "epoch end"])
def test_a_sigterm_behind_the_last_batch_is_not_swallowed(start: Start, tmp_path: Path, hook: str) -> None:
    process = start(fault_runs.train_terminated, tmp_path / "scar", tmp_path / "end", hook)
    finished(process)
    assert not (tmp_path / "end").exists(), "the script went on although it was told to stop"
    assert step_on_disk(tmp_path / "scar") == 16
    # Its fit was done, yet the script was not: started again it comes past its fit without a word or a step.
    model = fit(saver(tmp_path / "scar"))
    assert model.live == {}


def test_the_users_own_handler_of_sigterm_is_called_at_the_boundary(tmp_path: Path) -> None:
    called = []

    class Terminated(TinyModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 3:
                signal.raise_signal(signal.SIGTERM)
                assert called == []
            return super().training_step(batch, batch_idx)

    previous = signal.signal(signal.SIGTERM, lambda signum, frame: called.append(signum))
    own = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SIGTERMException):
            fit(saver(tmp_path, every_n_train_steps=100), model=Terminated())
        assert called == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert step_on_disk(tmp_path) == 4


# -- two ranks -----------------------------------------------------------------------------------------------------


def ranks(folder: Path, when: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{when}-{rank}.pt") for rank in range(2)]


def test_two_ranks_resume_as_one(start: Start, tmp_path: Path) -> None:
    scar, first, second, whole = (tmp_path / name for name in ("scar", "first", "second", "whole"))
    assert finished(start(fault_runs.train_ranks, scar, first, after=6)) == 1
    assert finished(start(fault_runs.train_ranks, scar, second)) == 0
    assert finished(start(fault_runs.train_ranks, tmp_path / "other", whole)) == 0
    assert_same(ranks(second, "start")[0], ranks(first, "last")[0])
    for folder in (second, whole):
        assert_same(*ranks(folder, "start"))
        assert_same(*ranks(folder, "last"))
    assert_same(ranks(second, "last")[0], ranks(whole, "last")[0])
    assert ranks(whole, "last")[0]["step"] == 8
    assert sorted(path.name for path in scar.glob("rank-*")) == ["rank-0000", "rank-0001"]
