"""Trainings with ``strategy="scar_ddp"`` under a real supervisor. What happens in the workers is in their script."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from helpers import assert_same
from hosts import Host, LocalHost
from prepared import kill_all
from scar_ddp_training import Model
from scar_job import RATE, samples
from torch import nn
from torch.distributed.elastic.utils.distributed import get_free_port

#: The same training through each front door.
SCRIPTS = {
    "Trainer": "scar_ddp_training.py",
    "Accelerate": "scar_loop_training.py",
    "Fabric": "scar_loop_training.py",
}
#: With buffers, a schedule and clipping.
REFERENCE: dict[str, Any] = {"model": {"rich": True}, "trainer": {"max_epochs": 3, "gradient_clip_val": 0.5}}
#: With random numbers besides, of each rank others.
WITH_DROPOUT: dict[str, Any] = {**REFERENCE, "model": {"rich": True, "dropout": True}, "seeds": True}

#: Where nothing depends on the words of Fabric, the other two tell enough.
DOORS = ["Trainer", "Accelerate"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

#: Where, when, who and how: ``("training_step", 4, 0, "kill")``. See ``place`` in the script.
Fault = tuple[str, int, int, str]


@dataclass
class Training:
    """How a job ended, and what its workers left.

    ``results`` has an entry for each rank that came to the end of the script; ``steps`` are the optimizer steps of all
    of them, ``attempts`` what they used in each attempt of a step, ``processes`` all that there were, and ``saves``
    what they saved when.
    """

    folder: Path
    code: int
    console: str
    seconds: float
    results: dict[int, dict[str, Any]]
    steps: list[dict[str, Any]]
    attempts: list[dict[str, Any]]
    processes: list[dict[str, Any]]
    saves: list[dict[str, Any]]

    @property
    def state(self) -> dict[str, Any]:
        return self.results[0]["state"]

    @property
    def generations(self) -> dict[int, int]:
        """Which one completed each step for those who live on.

        Workers may have died with a step that they had completed, and the others had not; then it is made again.
        """
        last: dict[int, int] = {}
        for step in self.steps:
            last[step["step"]] = max(last.get(step["step"], 0), step["generation"])
        return last

    def outages(self, rank: int) -> list[dict[str, Any]]:
        return self.results[rank]["outages"]


def train(
    folder: Path,
    *faults: Fault,
    ranks: int = 2,
    nodes: int = 1,
    strategy: str | dict[str, Any] = "scar_ddp",
    run: Sequence[str] | None = ("--max-restarts", "9"),
    command: Sequence[str] = (),
    door: str = "Trainer",
    real: bool = False,
    limit: float = 110,
    hosts: Sequence[Host] = (),
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **more: Any,
) -> Training:
    """A job from its start to its end, of which nothing may be left.

    Args:
        folder: All that it writes.
        faults: What goes wrong.
        ranks: How many.
        nodes: On so many nodes, which are supervisors on this machine.
        strategy: Its name, or arguments of ``SCARDDPStrategy``.
        run: Options of ``lightning-scar run``; ``None`` to start the script by itself.
        command: Another command that ends with a script.
        door: One of :data:`SCRIPTS`.
        real: Whether the supervisor and its workers are programs that start anew, as a user's do.
        limit: Seconds until it is killed.
        hosts: Where each node is; all here if not given.
        model: Arguments of the script's model.
        data: Arguments of its data.
        trainer: Arguments of its Trainer.
        more: What else the script knows: ``callbacks``, ``logs``, ``scar``, ``test``, ``cli``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked = {
        "folder": str(folder),
        "faults": faults,
        "ranks": ranks // nodes,
        "strategy": strategy,
        "door": door,
        **more,
    }
    asked |= {"model": model or {}, "data": data or {}, "trainer": {**(trainer or {}), "num_nodes": nodes}}
    if not command and run is None:
        command = [sys.executable]
    elif not command:
        command = [sys.executable, "-m", "lightning_scar", "run", "--nproc-per-node", str(ranks // nodes), *run]
    places: list[list[str]] = [[]]
    if nodes > 1:
        first = hosts[0].address if hosts else "127.0.0.1"
        endpoint = ["--nnodes", str(nodes), "--rdzv-endpoint", f"{first}:{get_free_port()}"]
        places = [[*endpoint, "--node-rank", str(node)] for node in range(nodes)]
    script = Path(__file__).with_name(SCRIPTS[door])
    # What is not Python by its name is not prepared.
    anew = ["env"] if real else []
    commands = [[*anew, *command, *place, str(script), json.dumps(asked)] for place in places]
    # Of these faults somebody else than the worker takes care.
    losses = {
        folder / f"fault-{i}": (slot * nodes // ranks, how)
        for i, (*_, slot, how) in enumerate(faults)
        if how in ("lose the host", "lose the supervisor") and not (folder / f"fault-{i}").exists()
    }
    hosts = hosts or [LocalHost()] * nodes
    supervisors = _Supervisors(commands, folder, hosts)
    code, console, seconds = supervisors.run(losses, limit)
    results = {int(p.stem.split("-")[1]): torch.load(p, "cpu", weights_only=False) for p in folder.glob("result-*.pt")}
    lines = (_lines(folder, name) for name in ("steps", "attempts", "processes", "saves"))
    training = Training(folder, code, console, seconds, results, *lines)
    _assert_nothing_left(training, hosts)
    return training


class _Supervisors:
    """Those of all nodes, from the beginning to the end of a job."""

    def __init__(self, commands: Sequence[Sequence[str]], folder: Path, hosts: Sequence[Host]) -> None:
        self._commands = commands
        self._folder = folder
        self._hosts = hosts
        self._processes: list[subprocess.Popen[bytes]] = []
        self._log = folder / "console.txt"
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

    def run(self, losses: dict[Path, tuple[int, str]], limit: float) -> tuple[int, str, float]:
        """The exit code, what all wrote, and how many seconds it took.

        Args:
            losses: Which node is lost and how, when a file is there. It is started again when it is missed.
            limit: Seconds until it is killed.

        """
        began = time.monotonic()
        self._processes = [self._start(node) for node in range(len(self._commands))]
        try:
            while any(process.poll() is None for process in self._processes):
                if any(mark.exists() for mark in losses):
                    # Those that are lost at once have a moment.
                    time.sleep(0.5)
                    self._lose(dict(losses.pop(mark) for mark in list(losses) if mark.exists()), began + limit)
                if time.monotonic() > began + limit:
                    self._show_stacks()
                    raise AssertionError(f"still running after {limit} s:\n{self._log.read_text()}")
                time.sleep(0.02)
        finally:
            for process in self._processes:
                if process.poll() is None:
                    kill_all(process.pid)
                    process.wait()
        codes = [process.returncode for process in self._processes]
        return max(codes, key=abs), self._log.read_text(), time.monotonic() - began

    def _show_stacks(self) -> None:
        """Let the workers write down where they are, and end."""
        noted = {process["pid"] for process in _lines(self._folder, "processes")}
        for supervisor in self._processes:
            with suppress(psutil.NoSuchProcess):
                for process in psutil.Process(supervisor.pid).children(recursive=True):
                    if process.pid in noted:
                        process.send_signal(signal.SIGABRT)
        time.sleep(1)

    def _start(self, node: int) -> "subprocess.Popen[bytes]":
        with self._log.open("a") as console:
            return self._hosts[node].popen(self._commands[node], self._environment, self._folder, console)

    def _lose(self, nodes: dict[int, str], until: float) -> None:
        said = self._log.read_text()
        for node, how in nodes.items():
            if how == "lose the host":
                self._hosts[node].lose()
            else:
                self._processes[node].kill()
            self._processes[node].wait()
        for node, how in nodes.items():
            # Without node 0 the job is over.
            if node > 0:
                self._wait_until_missed(node, said, until)
            if how == "lose the host":
                self._hosts[node].boot()
            if node > 0:
                self._processes[node] = self._start(node)

    def _wait_until_missed(self, node: int, said: str, until: float) -> None:
        words = f"node {node} was lost; "
        while self._log.read_text().count(words) == said.count(words) and time.monotonic() < until:
            time.sleep(0.02)


def _lines(folder: Path, name: str) -> list[dict[str, Any]]:
    paths = sorted(folder.glob(f"{name}-*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def _assert_nothing_left(training: Training, hosts: Sequence[Host]) -> None:
    deadline = time.monotonic() + 5
    pids = {process["pid"] for process in training.processes}
    while (left := {pid for host in hosts for pid in host.living(pids)}) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"processes are left: {left}\n{training.console}"
    for process in training.processes:
        assert process["state"] is None or not Path(process["state"]).exists()


# -- what is to be true afterwards -----------------------------------------------------------------------------------


def assert_done(training: Training, steps: int, ranks: int = 2) -> None:
    """It went to its end, everybody made every step once, and all have the same."""
    assert training.code == 0, training.console
    assert sorted(training.results) == list(range(ranks)), training.console
    for rank, result in training.results.items():
        assert (result["rank"], result["global_step"]) == (rank, steps), training.console
        assert result["is_global_zero"] == (rank == 0)
        assert_same(result["state"], training.state, f"rank {rank}")
        assert all(outage["steps_lost"] == 0 for outage in result["outages"])
    for slot in range(ranks):
        made = [step["step"] for step in training.steps if step["slot"] == slot]
        assert len(made) == len(set(made)), f"rank {slot} made a step twice: {made}\n{training.console}"
    assert {step["step"] for step in training.steps} == set(range(1, steps + 1))


def assert_lived_through(training: Training, rank: int, *words: str) -> None:
    """This rank, which did not die, tells of every outage in its order, and how it was mended."""
    outages = training.outages(rank)
    assert len(outages) == len(words), f"{outages}\n{training.console}"
    for outage, word in zip(outages, words, strict=True):
        assert word in outage["reason"], outages
        assert outage["seconds"] >= outage["survivors_seconds"] > 0
        assert f"lightning-scar: {outage['reason']} in step {outage['step'] + 1}; " in training.console


def world_sizes(training: Training) -> list[int]:
    """Of how many ranks each step was made, in order."""
    by_step: dict[int, set[int]] = {}
    generations = training.generations
    for step in training.steps:
        if step["generation"] == generations[step["step"]]:
            by_step.setdefault(step["step"], set()).add(step["world_size"])
    assert all(len(sizes) == 1 for sizes in by_step.values()), by_step
    return [sizes.pop() for _, sizes in sorted(by_step.items())]


def assert_steps_of_what_they_saw(training: Training) -> None:
    """The plain model, with these samples in each step, comes to the same weights in a single process."""
    used: dict[int, list[int]] = {}
    generations = training.generations
    for step in training.steps:
        if step["generation"] == generations[step["step"]]:
            used.setdefault(step["step"], []).extend(i for batch in step["used"] for i in batch)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    x, y, _ = samples().tensors
    for _, ids in sorted(used.items()):
        optimizer.zero_grad()
        nn.functional.mse_loss(model.net(x[ids]), y[ids]).backward()
        optimizer.step()
    for name, value in model.net.state_dict(prefix="net.").items():
        assert torch.allclose(training.state["state_dict"][name], value, atol=1e-5), name


@cache
def reference(dropout: bool = False, door: str = "Trainer") -> dict[str, Any]:
    """What a front door's own DDP makes of :data:`REFERENCE` on two ranks, or of :data:`WITH_DROPOUT`."""
    options = WITH_DROPOUT if dropout else REFERENCE
    command = TORCHRUN if door != "Trainer" else []
    with TemporaryDirectory(prefix="reference-") as folder:
        training = train(Path(folder), strategy="ddp", run=None, command=command, door=door, **options)
        assert training.code == 0, training.console
        return training.state
