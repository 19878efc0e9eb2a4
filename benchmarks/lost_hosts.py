"""For :mod:`benchmarks.outage`: a training on several hosts, some of which are lost with their processes and memory.

A host is a supervisor with one worker and its own memory folder. The optimizer's state is sharded: each rank saves its
part to the host's memory, from where it is copied to the next host's. A killed host is restarted at once with empty
memory.
"""

import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from torch.distributed.elastic.utils.distributed import get_free_port
from typing_extensions import override

from benchmarks.kills import Run, start_child
from benchmarks.step_log import Kill
from lightning_scar.elastic.supervisor.folder import MemoryFolder
from lightning_scar.elastic.supervisor.token import VARIABLE as TOKEN
from lightning_scar.storage.host_memory import VARIABLE


class LostHosts(Run):
    """A training whose kills hit whole hosts. The host of rank 0, which coordinates the job, is spared.

    Args:
        training: A worker's Python arguments.
        folder: Where its workers write.
        environment: Its environment.
        hosts: The number of hosts.

    """

    def __init__(self, training: Sequence[str], folder: Path, environment: Mapping[str, str], hosts: int) -> None:
        endpoint = ["--nnodes", str(hosts), "--rdzv-endpoint", f"127.0.0.1:{get_free_port()}"]  # type: ignore[no-untyped-call]
        self._run = ["-m", "lightning_scar", "run", *endpoint, "--max-restarts", "1000"]
        self._training = training
        self._environment = {**environment, TOKEN: secrets.token_hex()}
        self._memory = MemoryFolder()
        self._memories = [self._memory.path / f"host-{host}" for host in range(hosts)]
        for memory in self._memories:
            memory.mkdir()
        super().__init__(self._command(0), folder, self._environment_of(0))
        self._others = [self._start(host) for host in range(1, hosts)]

    @override
    def supervisors(self) -> list[int]:
        return [self.process.pid, *(other.pid for other in self._others)]

    @override
    def kill(self, rank: int, in_collective: bool = False) -> Kill | None:
        worker = self.worker(rank)
        if worker is None:
            return None
        supervisor, when = self._others[rank - 1], time.monotonic()
        # The supervisor dies first; the kernel then kills all that it started.
        for process in (supervisor, worker):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self._memories[rank], ignore_errors=True)
        supervisor.wait()
        self._memories[rank].mkdir()
        self._others[rank - 1] = self._start(rank)
        self.kills.append(Kill(when, rank, worker.pid))
        return self.kills[-1]

    @override
    def close(self) -> None:
        super().close()
        for other in self._others:
            other.wait()
        self._memory.close()

    def _command(self, host: int) -> list[str]:
        return [sys.executable, *self._run, "--node-rank", str(host), "--", *self._training]

    def _environment_of(self, host: int) -> dict[str, str]:
        return {**self._environment, VARIABLE: str(self._memories[host])}

    def _start(self, host: int) -> "subprocess.Popen[bytes]":
        return start_child(self._command(host), self._environment_of(host), self._output)
