"""How an agent comes to run its node's workers, and what it and node 0 tell each other of their lives."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch.distributed import Store  # type: ignore[attr-defined]

from lightning_scar.elastic.protocol.log import Events
from lightning_scar.elastic.protocol.messages import Arrived
from lightning_scar.elastic.supervisor.wakeups import Wakeups

#: Seconds between two heartbeats of an agent.
BEAT_SECONDS = 1.0
#: Seconds of silence after which node 0 and an agent take each other for lost.
SILENCE_SECONDS = 10
#: Seconds that node 0 may take to admit an agent, once it knows that the one before is gone.
_GRACE_SECONDS = 10.0


class NotAdmittedError(Exception):
    """The node has another agent, which lives, or nobody waits for this one any more."""


@dataclass(frozen=True)
class Admission:
    """The right to run the workers of a node.

    Args:
        agent: Which of the agents that the node ever had; 1 for the first.
        skipped: How many of the coordinator's notices were for those before it.

    """

    agent: int = 1
    skipped: int = 0


def agent_name(node: int, agent: int) -> str:
    """Return the name under which an agent introduces itself to node 0, which learns from it whose connection broke."""
    return f"{node}/{agent}"


def heartbeat_key(node: int, agent: int) -> str:
    """Return the key that counts an agent's heartbeats."""
    return f"heartbeat/{node}/{agent}"


def admission_key(node: int, agent: int) -> str:
    """Return the key under which an agent finds that it is admitted."""
    return f"admission/{node}/{agent}"


def loss_key(node: int, agent: int) -> str:
    """Return the key under which an agent finds that it counts as lost, and another one may have been admitted.

    An agent that no longer wants to wait sets it itself.
    """
    return f"loss/{node}/{agent}"


def left_key(node: int) -> str:
    """Return the key under which a node's agent says that it no longer needs the store."""
    return f"left/{node}"


def beat(store: Store, node: int, agent: int) -> None:
    """Publish one heartbeat of an agent."""
    store.add(heartbeat_key(node, agent), 1)


def arrive(store: Store, node: int, wakeups: Wakeups, *, stops: Callable[[], bool]) -> Admission:
    """Wait to be admitted as the agent of a node: at once if it has none, else when that one is lost.

    Args:
        store: The supervisor's, on node 0.
        node: Which node.
        wakeups: This supervisor's, connected to node 0.
        stops: Whether to stop waiting.

    Raises:
        NotAdmittedError: If the node's agent lives, or at a stop.

    """
    agent = store.add(f"arrivals/{node}", 1)
    wakeups.introduce(agent_name(node, agent))
    Events(store, wakeups.report).append(Arrived(node, agent))
    deadline = time.monotonic() + SILENCE_SECONDS + _GRACE_SECONDS
    while not store.check([admission_key(node, agent)]):
        left = deadline - time.monotonic()
        if stops() or left <= 0:
            store.set(loss_key(node, agent), "")
            raise NotAdmittedError
        beat(store, node, agent)
        wakeups.wait(min(left, BEAT_SECONDS))
    return Admission(agent, int(store.get(admission_key(node, agent))))
