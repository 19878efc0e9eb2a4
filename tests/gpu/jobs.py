"""Jobs under a real supervisor whose workers share a card, and lose each other."""

import os
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from scar_ddp_runs import Fault, Training, assert_done, train
from scar_ddp_training import Model
from scar_job import BATCH_SIZE, OPTIMIZERS, RATE, SAMPLES, samples
from torch import Tensor, nn

from gpu.part import NotShown, Setting, Skipped

#: In double precision, after some tens of steps, on another device.
_TOLERANCE = 1e-8
#: Seconds that the others wait for a worker that hangs. On a card a group takes longer to form.
_HANG = {"cuda": 20, "cpu": 6}
#: Where a process that has a CUDA context keeps files open; NVML opens only `nvidiactl`.
_OF_A_CONTEXT = "/dev/nvidia-uvm"


def trainer_gloo(setting: Setting) -> dict[str, Any]:
    """Two ranks of a Trainer: one dies in a step, and rank 0 while the other is in a collective."""
    return _killed(setting, "Trainer", 2, "gloo")


def trainer_nccl(setting: Setting) -> dict[str, Any]:
    """The same over NCCL, in which a dead peer makes no error."""
    return _killed(setting, "Trainer", 2, "nccl")


def loop_gloo(setting: Setting) -> dict[str, Any]:
    """Three ranks of a loop, of which two die in the same step, and later rank 0."""
    return _killed(setting, "Accelerate", 3, "gloo")


def loop_nccl(setting: Setting) -> dict[str, Any]:
    """The same over NCCL."""
    return _killed(setting, "Accelerate", 3, "nccl")


def hang_gloo(setting: Setting) -> dict[str, Any]:
    """A worker that is stopped while the other waits for it."""
    return _hanging(setting, "gloo")


def hang_nccl(setting: Setting) -> dict[str, Any]:
    """The same over NCCL."""
    return _hanging(setting, "nccl")


def broken_device(setting: Setting) -> dict[str, Any]:
    """An error of the device that stays, in a step and then in two replacements; and one that comes each time."""
    faults: list[Fault] = [("training_step", 2, 1, "break the device")]
    faults += [("start", predecessors, 1, "break the device") for predecessors in (1, 2)]
    job = _job(setting, "for-a-while", *faults, door="Trainer", ranks=2, backend="gloo")
    figures = _figures(job, faults, 2)
    always = [*faults, *(("start", predecessors, 1, "break the device") for predecessors in range(3, 9))]
    run = ("--max-restarts", "3")
    job = _job(setting, "for-ever", *always, door="Trainer", ranks=2, backend="gloo", run=run)
    figures |= {"for_ever_s": job.seconds, "for_ever_code": job.code}
    if job.code == 0 or "CUDA error" not in job.console:
        raise NotShown(f"a device that is broken for ever does not end the job and say so:\n{job.console}", figures)
    return figures


def random_numbers(setting: Setting) -> dict[str, Any]:
    """Dropout on the device: survivors, and replacements, draw what the dead ranks would have drawn."""
    faults: list[Fault] = [("training_step", 4, 0, "kill"), ("training_step", 9, 0, "kill"), ("backward", 9, 1, "kill")]
    options: dict[str, Any] = {"door": "Trainer", "ranks": 3, "backend": "gloo", "model": {"dropout": True}}
    job, undisturbed = _job(setting, "job", *faults, **options), _job(setting, "undisturbed", **options)
    figures: dict[str, Any] = {"job_s": job.seconds, "processes": len(job.processes)}
    for each in (job, undisturbed):
        _assert_done(each, figures, 3)
    weights = undisturbed.state["state_dict"]
    pairs = [(job.state["state_dict"][name], value) for name, value in weights.items()]
    figures["off_by"] = _difference(pairs)
    if _used(job) != _used(undisturbed) or figures["off_by"] > _TOLERANCE:
        raise NotShown("the training is another one than without failures", figures)
    return figures


def prepared_parent(setting: Setting) -> dict[str, Any]:
    """The process that workers are forked from opens no device, but they do; it forks a replacement, too."""
    faults: list[Fault] = [("training_step", 2, 1, "kill"), ("training_step", 20, 0, "a moment")]
    watch = _Watch()
    with watch:
        job = _job(setting, "job", *faults, door="Trainer", ranks=2, backend="gloo")
    pids = {process["pid"] for process in job.processes}
    figures = {**_figures(job, faults, 2), **watch.figures(pids)}
    if "workers start as programs" in job.console:
        raise NotShown(f"nothing is prepared:\n{job.console}", figures)
    if not figures["parents"] or figures["parents_with_a_context"]:
        raise NotShown("no parent was seen, or it has opened the device", figures)
    if setting.is_on_card and figures["workers_with_a_context"] < 3:
        raise NotShown("workers that train have no context, so nothing is shown", figures)
    return figures


# -- jobs ----------------------------------------------------------------------------------------------------------


def _killed(setting: Setting, door: str, ranks: int, backend: str) -> dict[str, Any]:
    if door == "Accelerate" and find_spec("accelerate") is None:
        raise Skipped("accelerate is not installed")
    epoch = _batches(ranks)
    faults: list[Fault] = [("training_step", 2, 1, "kill")]
    # At once with the one before, so that one of three is left.
    faults += [("training_step", 2, 2, "kill")] if ranks > 2 else []
    # It has reduced nothing yet when the others are in the collective.
    faults += [("backward", epoch + 2, 0, "kill"), ("backward", 2 * epoch + 2, 1, "kill")]
    job = _job(setting, "job", *faults, door=door, ranks=ranks, backend=backend)
    return _figures(job, faults, ranks)


def _hanging(setting: Setting, backend: str) -> dict[str, Any]:
    faults: list[Fault] = [("training_step", 4, 1, "stop")]
    patience = _HANG[setting.device]
    run = ("--max-restarts", "9", "--hang-timeout", str(patience))
    job = _job(setting, "job", *faults, door="Trainer", ranks=2, backend=backend, run=run)
    return {"hang_timeout_s": patience, **_figures(job, faults, 2)}


def _job(setting: Setting, name: str, *faults: Fault, backend: str, **options: Any) -> Training:
    """A job in double precision on the device, from its start to its end."""
    os.environ["SCAR_TESTS_DEVICE"] = setting.device
    os.environ["SCAR_TESTS_BACKEND"] = backend if setting.is_on_card or backend == "gloo" else "nccl_like"
    options = {"run": ("--max-restarts", "99"), "limit": 100, **options}
    model = {"double": True, "optimizer": "SGD", **options.pop("model", {})}
    return train(
        setting.folder / name,
        *faults,
        model=model,
        trainer={"max_epochs": 3, "limit_val_batches": 0},
        strategy={},
        real=True,
        **options,
    )


def _batches(ranks: int) -> int:
    """Of an epoch."""
    return SAMPLES // BATCH_SIZE // ranks


def _figures(job: Training, faults: Sequence[Fault], ranks: int) -> dict[str, Any]:
    """What an outage cost; the job has made each step once, of the samples that are its, and right."""
    outages = [outage for result in job.results.values() for outage in result["outages"]]
    figures: dict[str, Any] = {
        "job_s": round(job.seconds, 1),
        "outages": len(outages),
        "processes": len(job.processes),
    }
    for name in ("survivors_seconds", "seconds"):
        times = [outage[name] for outage in outages if outage[name]]
        figures |= {f"{name}_median": statistics.median(times), f"{name}_most": max(times)} if times else {}
    missing = [fault for i, fault in enumerate(faults) if not (job.folder / f"fault-{i}").exists()]
    if missing:
        raise NotShown(f"these faults never came: {missing}", figures)
    _assert_done(job, figures, ranks)
    figures["off_by"] = _difference_from_one_process(job)
    if figures["off_by"] > _TOLERANCE:
        raise NotShown("the weights are others than those of one process", figures)
    return figures


def _assert_done(job: Training, figures: dict[str, Any], ranks: int) -> None:
    try:
        assert_done(job, 3 * _batches(ranks), ranks)
        _assert_each_sample_once(job, ranks)
    except AssertionError as error:
        raise NotShown(str(error), figures) from error


def _used(job: Training) -> dict[int, list[int]]:
    """The samples of each step, over all workers."""
    used: dict[int, list[int]] = {}
    for step in job.steps:
        used.setdefault(step["step"], []).extend(i for batch in step["used"] for i in batch)
    return {step: sorted(ids) for step, ids in sorted(used.items())}


def _assert_each_sample_once(job: Training, ranks: int) -> None:
    used, epoch = list(_used(job).values()), _batches(ranks)
    assert {len(ids) for ids in used} == {ranks * BATCH_SIZE}, "steps have too few samples, or too many"
    for first in range(0, len(used), epoch):
        of_epoch = sorted(i for ids in used[first : first + epoch] for i in ids)
        assert of_epoch == list(range(SAMPLES)), f"the epoch at step {first} has other samples"


def _difference_from_one_process(job: Training) -> float:
    """How far the weights are from those of the same steps in this process, on the CPU, relative to the largest."""
    net = Model(double=True).net
    optimizer = OPTIMIZERS["SGD"](net.parameters(), RATE)
    x = samples().tensors[0].double()
    y = x.sum(1, keepdim=True)
    for ids in _used(job).values():
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x[ids]), y[ids]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    pairs = [(job.state["state_dict"][name], value) for name, value in net.state_dict(prefix="net.").items()]
    return _difference(pairs)


def _difference(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The largest one of a parameter, relative to the largest value of its tensor."""
    return max(float((found - value).abs().max() / value.abs().max()) for found, value in pairs)


# -- processes -----------------------------------------------------------------------------------------------------


class _Watch:
    """Notes which processes that this one has started open a device, while a block runs."""

    def __init__(self) -> None:
        #: By number: whether it forks workers, by its command line, which its forks share.
        self._is_prepared: dict[int, bool] = {}
        self._with_a_context: set[int] = set()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def figures(self, workers: set[int]) -> dict[str, Any]:
        """How many there were of each kind, given the numbers of those that train."""
        parents = {pid for pid, is_prepared in self._is_prepared.items() if is_prepared} - workers
        return {
            "parents": len(parents),
            "parents_with_a_context": len(parents & self._with_a_context),
            "workers": len(workers & set(self._is_prepared)),
            "workers_with_a_context": len(workers & self._with_a_context),
        }

    def _look(self) -> None:
        while not self._is_over.is_set():
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    self._note(process)
            time.sleep(0.1)

    def _note(self, process: psutil.Process) -> None:
        if words := process.cmdline():
            self._is_prepared[process.pid] = "lightning_scar.elastic.prepared" in words
        if _has_a_context(process.pid):
            self._with_a_context.add(process.pid)


def _has_a_context(pid: int) -> bool:
    try:
        files = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False
    return any(_target(file).startswith(_OF_A_CONTEXT) for file in files)


def _target(file: Path) -> str:
    try:
        return os.readlink(file)
    except OSError:
        return ""
