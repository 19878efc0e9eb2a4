"""Scripts for workers, and supervisors to run them."""

import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from tempfile import TemporaryFile
from typing import Protocol

import psutil
from prepared import PreparedPopen, kill_all, workers_are_prepared

from lightning_scar.elastic.supervisor.command_line import main

#: A plain script: counts to ten together with the others, and resumes from its own file.
PLAIN = """
import os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist

folder, what = Path(sys.argv[1]), sys.argv[2:]
rank = int(os.environ["RANK"])
(folder / f"pid{rank}").write_text(str(os.getpid()))
dist.init_process_group("gloo")
file = folder / f"step{rank}"
step = torch.tensor(int(file.read_text()) if file.exists() else 0)
dist.all_reduce(step, op=dist.ReduceOp.MIN)
is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
while step < 10:
    one = torch.ones(1)
    dist.all_reduce(one)
    assert one == dist.get_world_size()
    step += 1
    file.write_text(str(int(step)))
    if step == 8 and "listen" in what:
        import psutil
        pids = [os.getpid(), *map(int, what[1 + what.index("listen"):])]
        sockets = [one for pid in pids for one in psutil.Process(pid).net_connections("inet")]
        listening = {f"{one.laddr.ip} {one.laddr.port}" for one in sockets if one.status == psutil.CONN_LISTEN}
        (folder / f"listens{rank}").write_text("\\n".join(listening))
    while step == 8 and "wait" in what and not (folder / "go").exists():
        time.sleep(0.02)
    if step == 5 and rank == 1 and "kill" in what and is_first:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 5 and rank == 1 and "raise" in what:
        raise ValueError("boom")
    if step == 5 and rank == 1 and "exit" in what:
        os._exit(7)
    if "slow" in what:
        time.sleep(0.2)
# A process that ends while others still talk to its group may abort.
dist.destroy_process_group()
sys.stdout.write(f"rank {rank} is done\\n")  # print writes twice: lines could mix
"""

#: No torch: starts at once and sleeps.
SLEEPER = """
import os, signal, subprocess, sys, time
from pathlib import Path

folder, what = Path(sys.argv[1]), sys.argv[2:]
rank = os.environ["RANK"]
if "child" in what:
    child = subprocess.Popen(["sleep", "60"])
    (folder / f"child{rank}").write_text(str(child.pid))
if "stubborn" in what:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if "polite" in what:
    def end(number, frame):
        (folder / f"saved{rank}").write_text(signal.Signals(number).name)
        sys.exit(0)
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
if "handler" in what:
    def note(number, frame):
        with (folder / f"heard{rank}").open("a") as file:
            file.write(signal.Signals(number).name + "\\n")
    signal.signal(signal.SIGUSR1, note)
    signal.signal(signal.SIGUSR2, note)
(folder / f"state{rank}").write_text(os.environ["LIGHTNING_SCAR_STATE"])
(folder / f"pid{rank}").write_text(str(os.getpid()))
if "fail" in what and rank == "1":
    sys.stderr.write("half a line and bar 1%\\rbar 99%\\nlast words")
    sys.exit(3)
if "sleep" in what:
    time.sleep(60)
while "handler" in what and not (folder / f"heard{rank}").exists():
    time.sleep(0.02)
"""


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    return path


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "lightning_scar", "run", *map(str, arguments)]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a supervisor in this process, which has imported torch already; returns what it and its workers wrote."""
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        with led_to(1, out.fileno()), led_to(2, err.fileno()), redirect_stderr(err), workers_are_prepared():
            code = main([str(argument) for argument in arguments])
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(arguments, code, out.read(), err.read())


@contextmanager
def led_to(descriptor: int, other: int) -> Iterator[None]:
    before = os.dup(descriptor)
    os.dup2(other, descriptor)
    try:
        yield
    finally:
        os.dup2(before, descriptor)
        os.close(before)


@contextmanager
def running(
    *arguments: str | Path, kind: "type[subprocess.Popen[str]]" = PreparedPopen
) -> Iterator["subprocess.Popen[str]"]:
    """A supervisor; it and what it started are ended in the end.

    Args:
        arguments: What follows ``lightning-scar run``.
        kind: ``subprocess.Popen`` for a program that starts anew.

    """
    process = kind(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_all(process.pid)
        process.communicate()


class Ending(Protocol):
    """A process, or a worker."""

    def poll(self) -> int | None:
        """Its exit code, once it has one."""


def code_of(process: Ending, timeout: float = 30) -> int:
    """Its exit code, once it has ended."""
    deadline = time.monotonic() + timeout
    while (code := process.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return code


def wait_for(*paths: Path, timeout: float = 30) -> list[str]:
    """What the files hold, once they are there."""
    deadline = time.monotonic() + timeout
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline, f"none of {paths}"
        time.sleep(0.02)
    return [path.read_text() for path in paths]


def lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def assert_gone(*pids: int | str) -> None:
    deadline = time.monotonic() + 10
    while any(lives(int(pid)) for pid in pids):
        assert time.monotonic() < deadline, "a process lives on"
        time.sleep(0.02)


def ours(stderr: str) -> list[str]:
    """The lines that the supervisor wrote."""
    return re.findall(r"^lightning-scar: (.*)$", stderr, flags=re.MULTILINE)
