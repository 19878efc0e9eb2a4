"""Starts trainings in separate processes, kills some of their workers, and ends the rest."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil
from typing_extensions import Self

from benchmarks import step_log
from benchmarks.step_log import Kill, Line
from lightning_scar.elastic.prepared.starter import dying_with_this_process

#: The working directory for ``python -m benchmarks...``.
ROOT = Path(__file__).parents[1]
#: Seconds that a training has to end after SIGTERM.
_GRACE = 20.0
_POLL = 0.01

#: Variables that another training's launchers may have set.
_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment, for trainings on the loopback with one thread per worker."""
    own = {
        name: value
        for name, value in os.environ.items()
        if name not in _FOREIGN and not name.startswith(("LIGHTNING_SCAR_", "PL_"))
    }
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {**own, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback, "PYTHONWARNINGS": "ignore", **more}


def start_child(command: Sequence[str], environment: Mapping[str, str], output: IO[bytes]) -> "subprocess.Popen[bytes]":
    """Start a process that never outlives this one."""
    return subprocess.Popen(
        dying_with_this_process(command),
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


class Run:
    """A training.

    Args:
        command: Its command line.
        folder: Where its workers write; its output goes there, too.
        environment: Its environment.

    Attributes:
        seen: The processes that have belonged to it, as far as they were seen, with their start times.
        kills: The kills.

    """

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._output = (folder / "output").open("ab")
        self.started = time.monotonic()
        self.process = start_child(command, environment, self._output)
        self.seen: dict[int, float] = {self.process.pid: psutil.Process(self.process.pid).create_time()}
        self.kills: list[Kill] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def supervisors(self) -> list[int]:
        """Return the parent processes of the workers."""
        return [self.process.pid]

    @property
    def output(self) -> str:
        """The output of the training."""
        return (self.folder / "output").read_text(errors="replace")

    def lines(self) -> list[Line]:
        """Return the logged steps."""
        return step_log.read(self.folder)

    def workers(self) -> dict[int, psutil.Process]:
        """Return the live workers that have a log, by rank."""
        ranks = step_log.ranks(self.folder)
        found: dict[int, psutil.Process] = {}
        for process in self._children():
            # Processes come and go meanwhile.
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                self.seen[process.pid] = process.create_time()
                if process.pid in ranks and process.status() != psutil.STATUS_ZOMBIE:
                    found.setdefault(ranks[process.pid], process)
        return found

    def worker(self, rank: int) -> psutil.Process | None:
        """Return the live worker of a rank; ``None`` if there is none for some seconds."""
        # Processes that end during the look-up hide the others.
        self.wait_until(lambda: rank in self.workers(), 5)
        return self.workers().get(rank)

    def _children(self) -> Iterator[psutil.Process]:
        for pid in self.supervisors():
            with suppress(psutil.NoSuchProcess):
                supervisor = psutil.Process(pid)
                self.seen[pid] = supervisor.create_time()
                yield from supervisor.children(recursive=True)

    def wait_until(self, condition: Callable[[], bool], seconds: float, poll: float = _POLL) -> bool:
        """Wait; return whether the condition became true in time, before the training ended."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                return condition()
            time.sleep(poll)
        return True

    def steps(self) -> dict[int, int]:
        """Return the last step of the youngest process of each rank."""
        return {line.rank: line.step for line in self.lines()}

    def all_at(self, step: int, ranks: int) -> bool:
        """Return whether all ranks have reached a step."""
        steps = self.steps()
        return len(steps) == ranks and min(steps.values()) >= step

    def kill(self, rank: int, in_collective: bool = False) -> Kill | None:
        """Kill the worker of a rank.

        Args:
            rank: The rank.
            in_collective: Whether to kill it while gradients are reduced; the worker then does it itself.

        Returns:
            ``None`` if there is no such worker.

        """
        worker = self.worker(rank)
        if worker is None:
            return None
        when = time.monotonic()
        if in_collective:
            os.kill(worker.pid, signal.SIGUSR1)
            note = self.folder / f"killed-{worker.pid}"
            if not self.wait_until(note.exists, 10, poll=0.002):
                raise TimeoutError(f"rank {rank} has not reached a collective in 10 s")
            worker.wait(10)
            when = float(note.read_text())
        else:
            os.kill(worker.pid, signal.SIGKILL)
        self.kills.append(Kill(when, rank, worker.pid, in_collective))
        return self.kills[-1]

    def survivors(self) -> list[psutil.Process]:
        """Return the processes that are still alive."""
        left = []
        for pid, began in self.seen.items():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.create_time() == began and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(process)
        return left

    def close(self) -> None:
        """End the training: ask first, then kill what is left."""
        self.workers()
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE)
        for process in self.survivors():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self._output.close()
