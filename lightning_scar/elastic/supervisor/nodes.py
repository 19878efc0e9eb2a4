"""Which of the other nodes take part in the job. On node 0 only."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.distributed import Store  # type: ignore[attr-defined]

from lightning_scar.elastic.protocol.log import Notices
from lightning_scar.elastic.protocol.messages import Arrived, Back, Change, Lost
from lightning_scar.elastic.supervisor.admission import (
    LINES_KEY,
    SILENCE_SECONDS,
    admission_key,
    heartbeat_key,
    left_key,
    line_name,
    loss_key,
)
from lightning_scar.elastic.supervisor.agent import Layout
from lightning_scar.elastic.supervisor.line import Lines

#: Seconds that the nodes have to show up at the start.
JOIN_SECONDS = 600.0
#: Seconds between two looks at the signs of life.
_LOOK_SECONDS = 1.0


@dataclass
class _Node:
    """One of them.

    Args:
        number: Which one.
        slots: Its slots.
        since: When it was heard of last, or lost.
        agent: The number of the agent that was admitted; 0 for none.
        waiting: That of the newest one which waits to be.
        beat: How often the agent has given a sign of life.
        was_there: Whether there ever was one.
        is_given_up: Whether nobody waits for it any more.

    """

    number: int
    slots: tuple[int, ...]
    since: float
    agent: int = 0
    waiting: int = 0
    beat: int = 0
    was_there: bool = False
    is_given_up: bool = False


class Nodes:
    """The other nodes' agents, as they come, vanish and are replaced.

    An agent that arrives is admitted if its node has none: at once at the start of the job, later when the one before
    it is lost. One that counts as lost but lives, behind a broken network, finds that in the store, and ends.

    Args:
        store: The supervisor's.
        layout: The nodes.
        notices: What the coordinator has said: an agent that is not its node's first begins to listen behind it.
        node_timeout: Seconds for which a lost node is waited for.
        now: The time.

    """

    def __init__(self, store: Store, layout: Layout, notices: Notices, node_timeout: float, now: float) -> None:
        self._store = store
        self._notices = notices
        self._node_timeout = node_timeout
        self._nodes = [_Node(number, tuple(layout.slots(number)), now) for number in range(1, layout.nodes)]
        self._looked = now
        self._lines = Lines() if self._nodes else None
        if self._lines is not None:
            store.set(LINES_KEY, str(self._lines.port))

    def arrived(self, event: Arrived) -> None:
        """An agent waits to be admitted."""
        self._nodes[event.node - 1].waiting = event.agent

    def changes(self, now: float) -> Iterator[Change]:
        """What has become of the nodes since the last call.

        Each has to be published before the next one is asked for: a new agent begins to listen behind it.
        """
        gone = set(self._lines.ended()) if self._lines is not None else set()
        if now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            gone |= {line_name(node.number, node.agent) for node in self._nodes if self._is_silent(node, now)}
        for node in self._nodes:
            if line_name(node.number, node.waiting) in gone:
                node.waiting = 0
            if node.agent and line_name(node.number, node.agent) in gone:
                yield self._lose(node, now)
            if node.waiting and not node.agent:
                yield from self._admit(node, now)
            if self._is_overdue(node, now):
                yield self._give_up(node)

    def all_left(self) -> bool:
        """Whether no other node's agent needs the store any more."""
        there = [node for node in self._nodes if node.agent or node.waiting]
        return all(self._store.check([left_key(node.number)]) for node in there)

    def close(self) -> None:
        """Hangs up."""
        if self._lines is not None:
            self._lines.close()

    def _is_silent(self, node: _Node, now: float) -> bool:
        if not node.agent:
            return False
        # Beats are compared with each other, never with a clock.
        beat = self._store.add(heartbeat_key(node.number, node.agent), 0)
        if beat != node.beat:
            node.beat, node.since = beat, now
        return now - node.since > SILENCE_SECONDS

    def _lose(self, node: _Node, now: float) -> Lost:
        self._store.set(loss_key(node.number, node.agent), "")
        node.agent, node.since, node.is_given_up = 0, now, self._node_timeout == 0
        return Lost(node.number, node.slots, for_good=node.is_given_up)

    def _admit(self, node: _Node, now: float) -> Iterator[Back]:
        agent, node.waiting = node.waiting, 0
        if self._store.check([loss_key(node.number, agent)]):
            # It did not want to wait any longer.
            return
        is_first, node.was_there = not node.was_there, True
        node.agent, node.beat, node.since, node.is_given_up = agent, 0, now, False
        # What was said to the one before it is not meant for this one.
        self._store.set(admission_key(node.number, agent), str(0 if is_first else self._notices.length))
        if not is_first:
            yield Back(node.number, node.slots)

    def _is_overdue(self, node: _Node, now: float) -> bool:
        return not node.agent and not node.is_given_up and now - node.since > self._patience(node)

    def _patience(self, node: _Node) -> float:
        return self._node_timeout if node.was_there else JOIN_SECONDS

    def _give_up(self, node: _Node) -> Lost:
        node.is_given_up = True
        how = "was lost and has not come back" if node.was_there else "has not come"
        return Lost(node.number, node.slots, f"{how} within {self._patience(node):g} s", for_good=True)
