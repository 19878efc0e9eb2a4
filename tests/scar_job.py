"""What all scripts have in common that ``scar_ddp_runs`` starts: what is asked for, faults at their time, and data."""

import faulthandler
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import zlib
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scar_cards import break_device, share_cards
from torch._dynamo.utils import counters
from torch.utils.data import TensorDataset

#: Of process groups; the default one if nobody chooses.
BACKEND = os.environ.get("SCAR_TESTS_BACKEND", "gloo")
if BACKEND != "gloo":
    import lightning_scar.testing  # noqa: F401

SAMPLES, BATCH_SIZE = 96, 4
RATE = 0.01

#: What :func:`scar_ddp_runs.train` asks for.
asked: dict[str, Any] = {}
slot = int(os.environ.get("LIGHTNING_SCAR_SLOT", os.environ.get("LOCAL_RANK", "0")))


def begin() -> None:
    """Takes what is asked for from the command line, and notes that this process has begun."""
    faulthandler.enable()
    asked.update(json.loads(sys.argv[1]))
    share_cards(slot, asked["ranks"])
    #: How many processes had this slot before.
    asked["predecessors"] = 0
    # `python train.py` has a life before the supervisor's.
    if "LIGHTNING_SCAR_SLOT" in os.environ or asked["strategy"] == "ddp":
        log = folder() / f"processes-{slot}.jsonl"
        asked["predecessors"] = len(log.read_text().splitlines()) if log.exists() else 0
        write_down("processes", state=os.environ.get("LIGHTNING_SCAR_STATE"))
        place("start", asked["predecessors"])


def folder() -> Path:
    """Where everything is written."""
    return Path(asked["folder"])


# -- faults --------------------------------------------------------------------------------------------------------


def _raise() -> None:
    raise ValueError("a bug of this rank alone")


def _run_out_of_memory() -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, limits[1]))
    try:
        bytearray(1 << 40)
    finally:
        # Or the process could not even end.
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _signal(pid: int, number: int, times: int) -> None:
    for _ in range(times):
        os.kill(pid, number)
        time.sleep(0.02)


def _signal_oneself(name: str, twice: str = "") -> None:
    """As a scheduler does that signals all processes of a job: the supervisor, too."""
    for pid in (*([os.getppid()] if "LIGHTNING_SCAR_STORE" in os.environ else []), os.getpid()):
        _signal(pid, signal.Signals[name], times=2 if twice else 1)


def _use_a_pool() -> None:
    """Its processes are forked, and terminated at the end."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(abs, (-1,)) == 1


def _die_late() -> None:
    """When another rank has come to the end of its script, or waits for this one."""
    deadline = time.monotonic() + 2
    while not list(folder().glob("result-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def _disconnect() -> None:
    raise RuntimeError("gloo: this rank alone has lost the connection")


WAYS: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "error": _raise,
    "exit": lambda: os._exit(3),
    "memory": _run_out_of_memory,
    "disconnect": _disconnect,
    "break the device": break_device,
    "pool": _use_a_pool,
    "die late": _die_late,
    **{name: partial(_signal_oneself, *name.split()) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGTERM twice")},
    **{name: partial(_signal_oneself, *name.split()) for name in ("SIGINT twice", "SIGUSR1 twice")},
    "wait": lambda: time.sleep(100),
    "a moment": lambda: time.sleep(1),
    "two seconds": lambda: time.sleep(2),
    "terminate the job and wait": lambda: (os.kill(os.getppid(), signal.SIGTERM), time.sleep(100)),
    "interrupt the job and wait": lambda: (os.kill(os.getppid(), signal.SIGINT), time.sleep(100)),
    "terminate the job": lambda: os.kill(os.getppid(), signal.SIGTERM),
    "interrupt the job": lambda: os.kill(os.getppid(), signal.SIGINT),
    # Somebody else takes the host or the supervisor away meanwhile.
    "lose the host": lambda: time.sleep(60),
    "lose the supervisor": lambda: time.sleep(60),
}


def place(name: str, number: int) -> None:
    """Here a fault may be due; every one comes once."""
    for i, (where, at, rank, how) in enumerate(asked["faults"]):
        if (where, at, rank) == (name, number, slot):
            try:
                (folder() / f"fault-{i}").touch(exist_ok=False)
            except FileExistsError:
                continue
            if name == "training_step":
                wait_for_the_others()
            WAYS[how]()


def wait_for_the_others(limit: float = 0.5) -> None:
    """Until all have completed this worker's last step; if it dies before, some of them make that step again."""
    deadline = time.monotonic() + limit
    own = last_step(folder() / f"steps-{slot}.jsonl")
    while time.monotonic() < deadline and any(last_step(path) < own for path in folder().glob("steps-*.jsonl")):
        time.sleep(0.002)


def last_step(path: Path) -> int:
    """The last step that a rank has written down."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else -1


def write_down(name: str, **values: Any) -> None:
    """What outlives this process."""
    with (folder() / f"{name}-{slot}.jsonl").open("a") as file:
        file.write(json.dumps({"slot": slot, "pid": os.getpid(), **values}) + "\n")


def number_of_generation(member: Any) -> int:
    """That of a worker's present generation, or of its last one; -1 for a replacement that has not joined."""
    if member is None:
        return 0
    return member.generation.number if member.generation is not None else -1


# -- random numbers ------------------------------------------------------------------------------------------------


def seed_of_slot() -> None:
    """Lets each rank draw other numbers, if that is asked for."""
    if asked.get("seeds"):
        torch.manual_seed(100 + slot)


def generators() -> int:
    """A number that tells where torch's generator stands."""
    return zlib.crc32(torch.get_rng_state().numpy())


# -- compiled code -------------------------------------------------------------------------------------------------


def graphs() -> int:
    """How many have been compiled in this process."""
    return counters["stats"]["unique_graphs"]


# -- saves ---------------------------------------------------------------------------------------------------------


def options_of_scar() -> dict[str, Any]:
    """What JSON cannot say."""
    options = dict(asked.get("scar", {}))
    if "train_time_interval" in options:
        options["train_time_interval"] = timedelta(seconds=options["train_time_interval"])
    return options


def note_saves(schedule: Any) -> None:
    """Writes down what is saved."""
    note = schedule.note

    def noted(step: int, full: bool) -> None:
        write_down("saves", step=step, full=full)
        note(step, full)

    schedule.note = noted


class Averaging(torch.optim.Adam):
    """Communicates when it has changed the parameters already, as post-local SGD does."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if dist.is_initialized() and dist.get_world_size() > 1:
            for parameter in self.param_groups[0]["params"]:
                dist.all_reduce(parameter.data)
                parameter.data /= dist.get_world_size()
        return loss


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "SGD": partial(torch.optim.SGD, momentum=0.9),
}


class Used:
    """Which samples a step is made of in this worker: its own ones, and those of extra batches of an outage.

    An attempt is written down as soon as all of its batches are there: if it fails here, others may have completed it.

    Args:
        attempt: Returns the number of the step, and of the generation that makes it.

    """

    def __init__(self, attempt: Callable[[], dict[str, int]]) -> None:
        self.attempt = attempt
        self._attempt: dict[str, int] = {}
        strategy = asked.get("strategy")
        self._collects = isinstance(strategy, dict) and strategy.get("on_failure") == "buffer"
        self._own: list[list[int]] = []
        self._extra: list[list[int]] = []
        self._has_ended = True

    def begin(self, batch: list[int], is_first: bool) -> None:
        """Note a batch of the loop.

        Args:
            batch: Its samples.
            is_first: Whether it is the first one of a step.

        """
        if is_first:
            self._own, self._extra = [], []
        self._own.append(batch)

    def note(self, batch: list[int]) -> None:
        """Note what a training step gets."""
        now, attempt = self._own[-1] if self._own else [], self.attempt()
        # Stale gradients of the generation before count; its slices of missing batches do not.
        if attempt != self._attempt and not self._collects:
            self._extra = []
        self._attempt = attempt
        if batch == now:
            self._has_ended = True
            write_down("attempts", **attempt, used=self.list())
        # Not a part of the present batch, which is computed to see whether parts do.
        elif not set(batch) <= set(now):
            if self._has_ended:  # so the attempt before has failed
                self._extra = []
            self._has_ended = False
            # It may have failed before its own batch, too.
            self._extra = [*(extra for extra in self._extra if not set(extra) & set(batch)), batch]

    def list(self) -> list[list[int]]:
        return [*self._own, *self._extra]


# -- data ----------------------------------------------------------------------------------------------------------


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 8, generator=generator)
    if asked.get("model", {}).get("double"):
        x = x.double()
    return TensorDataset(x, x.sum(1, keepdim=True), torch.arange(SAMPLES))


def take(batch: list[Any]) -> list[Any]:
    """Return what is in a batch, whose first tensor is scaled in place, and whose last one is taken out."""
    return [batch[0].mul_(2), *batch[1:-1], batch.pop()]
