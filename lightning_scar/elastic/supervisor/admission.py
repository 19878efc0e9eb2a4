"""How an agent comes to run its node's workers, and what it and node 0 tell each other of their lives."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from torch.distributed import Store  # type: ignore[attr-defined]

from lightning_scar.elastic.protocol.log import Events
from lightning_scar.elastic.protocol.messages import Arrived
from lightning_scar.elastic.supervisor.line import Line

#: A node counts as gone when its agent has given no sign of life for so many seconds.
SILENCE_SECONDS = 30.0
#: Under which the store tells where node 0 listens for lines.
LINES_KEY = "lines"
#: Seconds that node 0 may take to admit an agent, once it knows that the one before is gone.
_GRACE_SECONDS = 10.0


class NotAdmittedError(Exception):
    """The node has another agent, which lives, or nobody waits for this one any more."""


@dataclass(frozen=True)
class Admission:
    """The right to run the workers of a node.

    Args:
        agent: Which of the agents that the node ever had; 1 for the first.
        heard: How many of the coordinator's notices were for those before it.
        line: The line to node 0; ``None`` where there is none.

    """

    agent: int = 1
    heard: int = 0
    line: Line | None = None

    def close(self) -> None:
        """Hangs up."""
        if self.line is not None:
            self.line.close()


def heartbeat_key(node: int, agent: int) -> str:
    """Under which an agent shows in the store that it lives."""
    return f"heartbeat/{node}/{agent}"


def admission_key(node: int, agent: int) -> str:
    """Under which an agent finds that it is admitted."""
    return f"admission/{node}/{agent}"


def loss_key(node: int, agent: int) -> str:
    """Under which an agent finds that it counts as lost, and another one may have been admitted.

    One that does not want to wait any longer says so there, too.
    """
    return f"loss/{node}/{agent}"


def left_key(node: int) -> str:
    """Under which a node's agent says that it needs the store no more."""
    return f"left/{node}"


def line_name(node: int, agent: int) -> str:
    """Who an agent is on its line."""
    return f"{node}.{agent}"


def arrive(store: Store, host: str, node: int, *, stops: Callable[[], bool], on_end: Callable[[], None]) -> Admission:
    """Waits to be admitted as the agent of a node: at once if it has none, else when that turns out to be gone.

    Args:
        store: The supervisor's, on node 0.
        host: The address of node 0.
        node: Which node.
        stops: Whether to wait no longer.
        on_end: Called in another thread when node 0 is gone, where there is a line to it.

    Raises:
        NotAdmittedError: If the node's agent lives, or at a stop.

    """
    agent = store.add(f"arrivals/{node}", 1)
    port = int(store.get(LINES_KEY))
    line = None
    # Where a firewall is in the way, silence has to tell.
    with suppress(OSError):
        line = Line(host, port, line_name(node, agent), on_end)
    Events(store).append(Arrived(node, agent))
    deadline = time.monotonic() + SILENCE_SECONDS + _GRACE_SECONDS
    while not store.check([admission_key(node, agent)]):
        if stops() or time.monotonic() > deadline:
            store.set(loss_key(node, agent), "")
            Admission(agent, 0, line).close()
            raise NotAdmittedError
        time.sleep(0.05)
    return Admission(agent, int(store.get(admission_key(node, agent))), line)
