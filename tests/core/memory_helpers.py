"""Runs that save to memory first, on one host or on several, and that are killed."""

import os
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from core_helpers import Training
from ranks import run_ranks
from shared_helpers import copied, make_training, opened, quietly

from lightning_scar.core.restoration import load
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.storage.delta import SUFFIX
from lightning_scar.storage.host_memory import VARIABLE
from lightning_scar.storage.store import DeltaStore

MEMORY = {"memory": True, "durable_every_n_saves": 4}


def state_at(step: int) -> dict[str, Any]:
    """What the training of these tests is like behind a step; all processes train alike."""
    training = make_training()
    while training.steps < step:
        training.step()
    return copied(training)


def folders(host: Path) -> list[str]:
    """The folders of runs in memory."""
    return sorted(path.name for path in host.glob("*/*/*"))


def killed(rank: int, host: Path, url: str, steps: int, resume: bool = False, **options: Any) -> None:
    """Saves behind every step, and is killed when the last of these saves is where it goes."""
    os.environ[VARIABLE] = str(host)
    training = make_training()
    running = opened(url, fraction=1.0, **MEMORY, **options)
    if resume:
        training.load(quietly(running)[0])
    for _ in range(steps):
        training.step()
        training.save(running)
        running.flush()
    wait_for_copies(running)
    running.ranks.gather(None)
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_copies(running: RunningCheckpoint) -> None:
    deadline = time.monotonic() + 60
    while running.store.chain is not None and running.store.chain.behind:
        assert time.monotonic() < deadline, running.store.chain.trouble
        time.sleep(0.01)


def kill(n: int, *args: Any, **options: Any) -> None:
    failures = run_ranks(killed, n, *args, failing=True, **options)
    assert [failure.type for failure in failures] == ["Ended"] * n, failures


def stored(url: str) -> int:
    """The step of the newest save in storage alone."""
    store = DeltaStore(url)
    store.refresh()
    return max(head.step for head in store.index.heads.values())


def storage_alone(url: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    with monkeypatch.context() as context:
        context.setenv(VARIABLE, "/nowhere")
        return load(url)


def resumed(rank: int, host: Path, url: str) -> tuple[dict[str, Any], str]:
    os.environ[VARIABLE] = str(host)
    training = make_training()
    with opened(url, fraction=1.0, **MEMORY) as running:
        found, _ = quietly(running)
        training.load(found)
        found = copied(training)
        training.step()
        training.save(running)
        return found, running.recovery


@torch.no_grad()
def train_and_spoil(training: Training, running: RunningCheckpoint, steps: int) -> None:
    """Saves behind every step, and then fills all parameters with NaN."""
    for _ in range(steps):
        training.step()
        training.save(running)
    running.flush()
    for parameter in training.model.parameters():
        parameter.fill_(torch.nan)


def heal(training: Training, running: RunningCheckpoint) -> str:
    """Heals everything; returns the plan."""
    parts = {"optimizers": {("optimizer_states", 0): training.optimizers[0]}}
    return str(running.heal(training.checkpoint(), parameters=training.model.parameters(), **parts))


def hosts_of(host: Path, n: int) -> list[Path]:
    """A folder for each of so many hosts."""
    found = [host / str(i) for i in range(n)]
    for folder in found:
        folder.mkdir(exist_ok=True)
    return found


def killed_on_hosts(rank: int, hosts: list[Path], url: str, steps: int, **options: Any) -> None:
    killed(rank, hosts[rank], url, steps, **options)


def resumed_on_hosts(rank: int, hosts: list[Path], url: str) -> tuple[dict[str, Any], str]:
    return resumed(rank, hosts[rank], url)


def files_of(host: Path, rank: int) -> dict[str, bytes]:
    """What a host has in memory of a rank, its own or a copy."""
    return {path.name: path.read_bytes() for path in host.glob(f"*/*/*/rank-{rank:04d}/*{SUFFIX}")}


def left_behind(hosts: list[Path]) -> list[Path]:
    return [path for host in hosts for path in host.glob("*/*/**/*")]


def kill_on_hosts(hosts: list[Path], *args: Any, **options: Any) -> None:
    failures = run_ranks(killed_on_hosts, len(hosts), hosts, *args, failing=True, **options)
    assert [failure.type for failure in failures] == ["Ended"] * len(hosts), failures


def lose(host: Path) -> None:
    shutil.rmtree(host)
    host.mkdir()


def unwritable(*args: Any) -> Any:
    raise OSError("the disk is full")


@contextmanager
def warned() -> Iterator[list[str]]:
    """What is warned of in the ``with`` block, filled in at its end."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(warning.message) for warning in caught]


def steps_of(found: dict[str, Any], *steps: int) -> list[int]:
    """For every row of every parameter of which of these steps it is."""
    then = {step: state_at(step)["state_dict"] for step in steps}
    found_steps = []
    for name, tensor in found["state_dict"].items():
        for i, row in enumerate(tensor):
            (step,) = [step for step, state in then.items() if torch.equal(row, state[name][i])]
            found_steps.append(step)
    return found_steps


def mount(host: Path, size: str) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", host], stderr=subprocess.DEVNULL
    ).returncode:
        pytest.skip("a tmpfs cannot be mounted here")


def unmount(host: Path) -> None:
    subprocess.run(["umount", "-l", host], check=True)
