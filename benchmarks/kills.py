"""Starts trainings in processes of their own, kills some of their workers, and ends what is left."""

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

#: Where ``python -m benchmarks...`` works.
ROOT = Path(__file__).parents[1]
_DIE_WITH_PARENT = ROOT / "lightning_scar" / "elastic" / "supervisor" / "die_with_parent.py"
#: Seconds that a training has to end after it was asked to.
_GRACE = 20.0
_POLL = 0.01

#: What the launchers of another training would leave to this one.
_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


def environment(**more: str) -> dict[str, str]:
    """This process's, for trainings on the loopback with one thread a worker."""
    own = {
        name: value
        for name, value in os.environ.items()
        if name not in _FOREIGN and not name.startswith(("LIGHTNING_SCAR_", "PL_"))
    }
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {**own, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback, "PYTHONWARNINGS": "ignore", **more}


def start_child(command: Sequence[str], environment: Mapping[str, str], output: IO[bytes]) -> "subprocess.Popen[bytes]":
    """Starts a process that does not outlive this one, however that ends."""
    tied = [sys.executable, "-I", "-S", str(_DIE_WITH_PARENT), str(os.getpid())]
    return subprocess.Popen(
        [*tied, *command], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )


class Run:
    """A training.

    Args:
        command: What starts it.
        folder: Where its workers write; what it prints comes there, too.
        environment: Its environment.

    Attributes:
        seen: The processes that belonged to it at any time, as far as somebody looked, with their start times.
        kills: What was killed.
        state_folders: Where the supervisor keeps states in memory.

    """

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._output = (folder / "output").open("ab")
        self.started = time.monotonic()
        self.process = start_child(command, environment, self._output)
        self.seen: dict[int, float] = {self.process.pid: psutil.Process(self.process.pid).create_time()}
        self.state_folders: set[Path] = set()
        self.kills: list[Kill] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def supervisors(self) -> list[int]:
        """The processes that workers are children of."""
        return [self.process.pid]

    @property
    def output(self) -> str:
        """What it printed."""
        return (self.folder / "output").read_text(errors="replace")

    def lines(self) -> list[Line]:
        """The steps that were made."""
        return step_log.read(self.folder)

    def workers(self) -> dict[int, psutil.Process]:
        """The live workers, by rank."""
        found: dict[int, psutil.Process] = {}
        for process in self._children():
            # Processes come and go meanwhile.
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                self.seen[process.pid] = process.create_time()
                variables = process.environ()
                if "LIGHTNING_SCAR_STATE" in variables:
                    self.state_folders.add(Path(variables["LIGHTNING_SCAR_STATE"]))
                if "RANK" in variables and process.status() != psutil.STATUS_ZOMBIE:
                    found.setdefault(int(variables["RANK"]), process)
        return found

    def _children(self) -> Iterator[psutil.Process]:
        for pid in self.supervisors():
            with suppress(psutil.NoSuchProcess):
                supervisor = psutil.Process(pid)
                self.seen[pid] = supervisor.create_time()
                yield from supervisor.children(recursive=True)

    def wait_until(self, condition: Callable[[], bool], seconds: float, poll: float = _POLL) -> bool:
        """Waits; returns whether the condition came true in time, and before the training ended."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or self.process.poll() is not None:
                return condition()
            time.sleep(poll)
        return True

    def steps(self) -> dict[int, int]:
        """The last step of the youngest process of each rank."""
        return {line.rank: line.step for line in self.lines()}

    def all_at(self, step: int, ranks: int) -> bool:
        """Whether all ranks have come so far."""
        steps = self.steps()
        return len(steps) == ranks and min(steps.values()) >= step

    def kill(self, rank: int, in_collective: bool = False) -> Kill | None:
        """Kills the worker of a rank.

        Args:
            rank: Whose.
            in_collective: Whether it shall be while gradients are being reduced; the worker does it itself then.

        Returns:
            ``None`` if there is no such worker.

        """
        # Processes that end while one looks at them hide the others.
        self.wait_until(lambda: rank in self.workers(), 5)
        worker = self.workers().get(rank)
        if worker is None:
            return None
        when = time.monotonic()
        if in_collective:
            os.kill(worker.pid, signal.SIGUSR1)
            note = self.folder / f"killed-{worker.pid}"
            if not self.wait_until(note.exists, 10, poll=0.002):
                raise TimeoutError(f"rank {rank} has not come to a collective in 10 s")
            worker.wait(10)
            when = float(note.read_text())
        else:
            os.kill(worker.pid, signal.SIGKILL)
        self.kills.append(Kill(when, rank, worker.pid, in_collective))
        return self.kills[-1]

    def survivors(self) -> list[psutil.Process]:
        """Whatever of it is still alive."""
        left = []
        for pid, began in self.seen.items():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.create_time() == began and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(process)
        return left

    def close(self) -> None:
        """Ends it: asks first, and kills what is left."""
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
