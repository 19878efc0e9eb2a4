"""The agent of a node: it starts and ends workers for the coordinator, and reports how they exit."""

import signal
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_scar.elastic.prepared.starter import Starter
from lightning_scar.elastic.protocol.doorbell import LOOPBACK
from lightning_scar.elastic.protocol.log import Events, Notices
from lightning_scar.elastic.protocol.messages import (
    Exited,
    Finish,
    Kill,
    Notice,
    SparesWaiting,
    Spawn,
    Started,
    Stop,
)
from lightning_scar.elastic.supervisor.admission import BEAT_SECONDS, Admission, beat, left_key, loss_key
from lightning_scar.elastic.supervisor.gate import Tunnel
from lightning_scar.elastic.supervisor.job import Layout
from lightning_scar.elastic.supervisor.process import WorkerProcess
from lightning_scar.elastic.supervisor.spares import Spares

#: Seconds that workers have to exit when the supervisor itself fails.
_LAST_GRACE = 5.0
#: Signals whose meaning is up to the program. A scheduler sends them to the supervisor only.
USER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


def port_key(attempt: int) -> str:
    """Return the key of the port of the store for the scripts' own groups."""
    return f"master_port/{attempt}"


class Agent:
    """Runs the workers of one node.

    Args:
        store: The supervisor's.
        tunnel: The way to it; ``None`` on node 0.
        layout: The nodes, and which of them this one is.
        admission: Its right to run this node's workers.
        starter: Starts them.
        spares: Replacements that wait.
        environment: What is added to every worker's environment.
        events: What it reports to.

    """

    def __init__(
        self,
        store: TCPStore,
        tunnel: Tunnel | None,
        layout: Layout,
        admission: Admission,
        starter: Starter,
        spares: Spares,
        environment: Mapping[str, str],
        events: Events,
    ) -> None:
        self.code: int | None = None
        self.reason = ""
        self._store = store
        self._tunnel = tunnel
        self._layout = layout
        self._admission = admission
        self._starter = starter
        self._spares = spares
        #: How many of them the coordinator knows of.
        self._told_spares = 0
        self._environment = environment
        self._events = events
        self._notices = Notices(store)
        self._workers: dict[int, tuple[Spawn, WorkerProcess]] = {}
        #: Workers that start when the starter is ready.
        self._due: dict[int, Spawn] = {}
        self._beat_at = 0.0
        for notice in self._notices.skip(admission.skipped):
            # The job may have ended before this agent came.
            if isinstance(notice, Stop | Finish):
                self._handle(notice)

    def step(self) -> None:
        """Do what notices ask for, and report which workers have exited.

        Raises:
            torch.distributed.DistError: If the store cannot be reached.

        """
        self._beat()
        # When the job is over the store may vanish at any moment.
        news = self._notices.news()
        while self.code is None and (notice := next(news, None)) is not None:
            self._handle(notice)
        if self.code is not None:
            return
        while self._due and self._starter.is_ready:
            self._start(self._due.pop(min(self._due)))
        for slot, (spawn, worker) in list(self._workers.items()):
            code = worker.poll()
            if code is not None:
                del self._workers[slot]
                self._events.append(Exited(slot, spawn.spawn, code, worker.tail()))

    def pass_on(self, number: int) -> bool:
        """Send one of :data:`USER_SIGNALS` to the workers that handle it. Return whether there are any."""
        workers = [worker for _, worker in self._workers.values() if _handles(worker.pid, number)]
        for worker in workers:
            worker.send(number)
        return bool(workers)

    def close(self) -> None:
        """End all workers that are left."""
        self._spares.close()
        deadline = time.monotonic() + _LAST_GRACE
        workers = [worker for _, worker in self._workers.values()]
        for worker in workers:
            worker.send(signal.SIGTERM)
        while None in [worker.poll() for worker in workers] and time.monotonic() < deadline:
            time.sleep(0.02)
        for worker in workers:
            worker.send(signal.SIGKILL)

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._beat_at >= BEAT_SECONDS:
            beat(self._store, self._layout.node, self._admission.agent)
            self._beat_at = now
            self._check_loss()
            self._starter.import_more()
            self._spares.refill()
            if self._spares.waiting != self._told_spares:
                self._told_spares = self._spares.waiting
                self._events.append(SparesWaiting(self._layout.node, self._told_spares))

    def _check_loss(self) -> None:
        """End the job on this node if another agent may have taken this one's place."""
        if self._store.check([loss_key(self._layout.node, self._admission.agent)]):
            self.code, self.reason = 1, "node 0 has given this node up for lost"

    def _handle(self, notice: Notice) -> None:
        if isinstance(notice, Spawn) and notice.node == self._layout.node:
            self._check_loss()
            if self.code is None:
                self._due[notice.slot] = notice
        elif isinstance(notice, Kill) and notice.slot in self._due:
            if self._due[notice.slot].spawn == notice.spawn:
                del self._due[notice.slot]
                self._events.append(Exited(notice.slot, notice.spawn, -notice.signal))
        elif isinstance(notice, Kill) and notice.slot in self._workers:
            spawn, worker = self._workers[notice.slot]
            if spawn.spawn == notice.spawn:
                worker.send(notice.signal)
        elif isinstance(notice, Stop):
            self.reason = notice.reason
        elif isinstance(notice, Finish):
            self.code = notice.code
            self._store.set(left_key(self._layout.node), "")

    def _start(self, spawn: Spawn) -> None:
        environment = self._environment_of(spawn)
        # In the place of a member of a new start a spare might remember what is not true any more.
        worker = self._spares.take(environment) if spawn.generation < 0 else None
        try:
            worker = worker or WorkerProcess(partial(self._starter.start, environment))
        except OSError as error:
            self._events.append(Exited(spawn.slot, spawn.spawn, 1, f"cannot start a process: {error}"))
            return
        self._workers[spawn.slot] = (spawn, worker)
        self._events.append(Started(spawn.slot, spawn.spawn, worker.pid))

    def _environment_of(self, spawn: Spawn) -> dict[str, str]:
        layout, group_port = self._layout, int(self._store.get(port_key(spawn.attempt)))
        values = {
            # torchrun's.
            "RANK": spawn.slot,
            "LOCAL_RANK": spawn.slot % layout.per_node,
            "WORLD_SIZE": layout.world_size,
            "LOCAL_WORLD_SIZE": layout.per_node,
            # Of the slot's own node, whoever runs it, as its local rank is.
            "GROUP_RANK": spawn.slot // layout.per_node,
            "GROUP_WORLD_SIZE": layout.nodes,
            "ROLE_NAME": "default",
            "ROLE_RANK": spawn.slot,
            "ROLE_WORLD_SIZE": layout.world_size,
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": group_port if self._tunnel is None else self._tunnel.port_to(group_port),
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_RESTART_COUNT": spawn.attempt,
            # Ours.
            "LIGHTNING_SCAR_STORE": f"{LOOPBACK}:{self._store.port}",
            "LIGHTNING_SCAR_SLOT": spawn.slot,
            "LIGHTNING_SCAR_SPAWN": spawn.spawn,
            "LIGHTNING_SCAR_GENERATION": spawn.generation,
        }
        return {**{name: str(value) for name, value in values.items()}, **self._environment}


def _handles(pid: int, number: int) -> bool:
    """Return whether a process has a handler for one of :data:`USER_SIGNALS`. Without one it would die of it."""
    if number not in USER_SIGNALS:
        return False
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)
