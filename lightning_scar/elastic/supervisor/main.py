"""Run a script in several workers and keep it running: ``lightning-scar run``."""

import errno
import json
import os
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from lightning_scar.elastic.prepared.starter import Starter
from lightning_scar.elastic.protocol.doorbell import LOOPBACK
from lightning_scar.elastic.protocol.log import Events
from lightning_scar.elastic.protocol.messages import StopAsked
from lightning_scar.elastic.supervisor.admission import Admission, NotAdmittedError, arrive
from lightning_scar.elastic.supervisor.agent import USER_SIGNALS, Agent
from lightning_scar.elastic.supervisor.folder import MemoryFolder
from lightning_scar.elastic.supervisor.gate import Gate, NotLetInError, Tunnel, loopback_store
from lightning_scar.elastic.supervisor.job import Job, LaunchError
from lightning_scar.elastic.supervisor.node_zero import NodeZero
from lightning_scar.elastic.supervisor.nodes import JOIN_SECONDS
from lightning_scar.elastic.supervisor.spares import Spares
from lightning_scar.elastic.supervisor.token import TokenError, find_token
from lightning_scar.elastic.supervisor.wakeups import Wakeups
from lightning_scar.elastic.supervisor.wording import signal_name, tell_user
from lightning_scar.elastic.worker.state_folder import VARIABLE

#: Seconds after which the supervisor looks for what is due by the clock.
_TICK_SECONDS = 0.1
#: Seconds that an agent waits for a key in the store.
_ANSWER_SECONDS = 30
#: Where the other nodes find the port on which node 0 is told of news.
_DOORBELL_KEY = "doorbell"


def supervise(job: Job, folder: MemoryFolder, starter: Starter) -> int:
    """Run a job on this node, to its end.

    Args:
        job: The job.
        folder: Where its workers leave files for those that come after them.
        starter: Starts them.

    Returns:
        The exit code: 0 if all workers exited with 0, 128 + the signal's number after a signal, else 1.

    Raises:
        LaunchError: If it cannot start.

    """
    signals: list[int] = []
    with ExitStack() as stack:
        stack.enter_context(_collected(signals))
        tunnel = None if job.layout.node == 0 else stack.enter_context(closing(_tunnel(job, signals)))
        store = _serve(job, stack) if tunnel is None else _join(job, tunnel)
        wakeups = stack.enter_context(closing(_wakeups(store, tunnel)))
        stack.enter_context(wakeups.woken_by_signals())
        environment = _environment(job, store, folder, wakeups)
        zero = NodeZero(store, job.layout, job.policy, wakeups, tell_user) if job.layout.node == 0 else None
        # The survivors of an outage need not wait until the replacement is forked.
        starter.meanwhile = None if zero is None else zero.step
        admission = Admission() if zero is not None else _arrive(job, store, wakeups, signals)
        events = Events(store, wakeups.report)
        try:
            spares = Spares(starter, job.spares, environment, tell_user)
            agent = Agent(store, tunnel, job.layout, admission, starter, spares, environment, events)
            stack.enter_context(closing(agent))
            return _run(agent, zero, events, wakeups, signals, job.layout.node)
        except DistError as error:
            tell_user(f"the supervisor on node 0 is gone or out of reach; ending the workers of this node ({error})")
            return 1


def _run(agent: Agent, zero: NodeZero | None, events: Events, wakeups: Wakeups, signals: list[int], node: int) -> int:
    wakeups.report()
    while agent.code is None:
        wakeups.wait(_TICK_SECONDS)
        while signals:
            number = signals.pop(0)
            if not agent.pass_on(number):
                events.append(StopAsked(number, node))
        if zero is not None:
            zero.step()
        agent.step()
    if zero is not None:
        zero.wait_for_agents()
    elif agent.code:
        tell_user(f"the job ended: {agent.reason or 'see node 0'}")
    return agent.code


@contextmanager
def _collected(signals: list[int]) -> Iterator[None]:
    """Collect the signals that ask for an end, and those with which SLURM warns of it (``--signal=USR1``)."""
    numbers = [signal.SIGINT, signal.SIGTERM, *USER_SIGNALS]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: signals.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment(job: Job, store: TCPStore, folder: MemoryFolder, wakeups: Wakeups) -> dict[str, str]:
    environment = {
        "TORCHELASTIC_RUN_ID": json.loads(store.get("job"))["run_id"],
        "TORCHELASTIC_MAX_RESTARTS": str(job.policy.max_restarts),
        "LIGHTNING_SCAR_DOORBELL": str(wakeups.port),
        VARIABLE: str(folder.path),
    }
    if job.hang_timeout is not None:
        environment["LIGHTNING_SCAR_HANG_TIMEOUT"] = str(job.hang_timeout)
    if job.layout.nodes > 1:
        environment["LIGHTNING_SCAR_NODE_0"] = job.host
    else:
        environment |= {name: value for name, value in _loopback_only().items() if name not in os.environ}
    return environment


def _loopback_only() -> dict[str, str]:
    """Return what keeps process groups on the loopback: those of gloo, NCCL, and torch's RPC."""
    names = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    return {f"{library}_SOCKET_IFNAME": name for name in names for library in ("GLOO", "NCCL", "TP")}


# -- the store ------------------------------------------------------------------------------------------------------


def _serve(job: Job, stack: ExitStack) -> TCPStore:
    try:
        if job.layout.nodes == 1:
            store = loopback_store(job.port)
        else:
            store = loopback_store()
            stack.enter_context(closing(Gate(job.port, find_token(make=True), store.port, tell_user)))
    except TokenError as error:
        raise LaunchError(str(error)) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            remedy = "omit --rdzv-endpoint and --master-port" if job.layout.nodes == 1 else "choose another one"
            raise LaunchError(f"port {job.port} is taken, perhaps by another job; {remedy}, or end that job") from None
        raise LaunchError(f"cannot listen on port {job.port}: {error}") from None
    about = {"run_id": job.run_id or uuid.uuid4().hex, "nodes": job.layout.nodes, "per_node": job.layout.per_node}
    # Before the job is published: agents append events as soon as they know it.
    Events.create(store)
    store.set("job", json.dumps(about))
    return store


def _tunnel(job: Job, signals: list[int]) -> Tunnel:
    _wait_for_node_0(job, signals)
    try:
        return Tunnel(job.host, job.port, find_token(make=False))
    except (NotLetInError, TokenError) as error:
        raise LaunchError(str(error)) from None
    except OSError as error:
        raise LaunchError(f"{job.host}:{job.port} does not answer as a supervisor does: {error}") from None


def _join(job: Job, tunnel: Tunnel) -> TCPStore:
    try:
        timeout = timedelta(seconds=_ANSWER_SECONDS)
        store = TCPStore(LOOPBACK, tunnel.port_to(), is_master=False, wait_for_workers=False, timeout=timeout)
        about = json.loads(store.get("job"))
    except DistError as error:
        raise LaunchError(f"{job.host}:{job.port} does not answer as a supervisor does: {error}") from None
    for name, mine in (("nodes", job.layout.nodes), ("per_node", job.layout.per_node)):
        if about[name] != mine:
            option = "--nnodes" if name == "nodes" else "--nproc-per-node"
            raise LaunchError(f"{option} is {mine} on this node and {about[name]} on node 0; give the same on all")
    return store


def _wakeups(store: TCPStore, tunnel: Tunnel | None) -> Wakeups:
    if tunnel is not None:
        return Wakeups(node_0=tunnel.port_to(int(store.get(_DOORBELL_KEY))))
    wakeups = Wakeups()
    store.set(_DOORBELL_KEY, str(wakeups.port))
    return wakeups


def _arrive(job: Job, store: TCPStore, wakeups: Wakeups, signals: list[int]) -> Admission:
    node = job.layout.node
    try:
        return arrive(store, node, wakeups, stops=lambda: bool(signals))
    except NotAdmittedError:
        if signals:
            raise LaunchError(f"ended by {signal_name(signals[0])} before node 0 admitted this node") from None
        raise LaunchError(f"another node with --node-rank {node} is running; give each its own") from None
    except DistError as error:
        raise LaunchError(f"the supervisor on node 0 has ended ({error})") from None


def _wait_for_node_0(job: Job, signals: list[int]) -> None:
    deadline = time.monotonic() + JOIN_SECONDS
    while reason := _refusal(job):
        if signals:
            raise LaunchError(f"ended by {signal_name(signals[0])} before node 0 was there")
        if time.monotonic() > deadline:
            raise LaunchError(f"node 0 cannot be reached at {job.host}:{job.port}: {reason}")
        time.sleep(0.5)


def _refusal(job: Job) -> str:
    """Return why the port does not answer, or "" if it does."""
    try:
        socket.create_connection((job.host, job.port), timeout=5).close()
    except OSError as error:
        return str(error)
    return ""
