"""Which of the other nodes are in the job. Used on node 0 only."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch.distributed import Store  # type: ignore[attr-defined]

from lightning_scar.elastic.protocol.log import Notices
from lightning_scar.elastic.protocol.messages import Arrived, Back, Change, Lost
from lightning_scar.elastic.supervisor.admission import (
    BEAT_SECONDS,
    SILENCE_SECONDS,
    admission_key,
    agent_name,
    heartbeat_key,
    left_key,
    loss_key,
)
from lightning_scar.elastic.supervisor.job import Layout

#: Seconds that nodes have to arrive at the start.
JOIN_SECONDS = 600.0
#: Seconds of silence that are enough if another agent waits to take the place.
_REPLACED_SECONDS = 3


@dataclass
class _Agent:
    """An agent that was admitted, or waits to be.

    Args:
        number: Which of the agents that the node ever had.
        beats: How many of its heartbeats were seen.
        silence: Seconds for which there was no new one.
        is_gone: Whether its connection broke: its process is no more.

    """

    number: int
    beats: int = 0
    silence: float = 0.0
    is_gone: bool = False

    def listen(self, beats: int) -> None:
        """Compare the heartbeats with those at the last check, one beat's time ago.

        Silence is counted in checks, not by the clock: where node 0 itself was stopped for a while, nobody was silent.
        """
        self.silence = self.silence + BEAT_SECONDS if beats == self.beats else 0.0
        self.beats = beats


@dataclass
class _Node:
    """One of the other nodes.

    Args:
        number: Which one.
        slots: Its slots.
        since: Since when it has had no agent.
        agent: The agent that was admitted.
        waiting: The newest one that waits to be.
        was_there: Whether it ever had one.
        is_given_up: Whether nobody waits for it any more.

    """

    number: int
    slots: tuple[int, ...]
    since: float
    agent: _Agent | None = None
    waiting: _Agent | None = None
    was_there: bool = False
    is_given_up: bool = False

    @property
    def is_lost(self) -> bool:
        """Whether its agent is gone, or has been silent for too long."""
        limit = SILENCE_SECONDS if self.waiting is None else min(SILENCE_SECONDS, _REPLACED_SECONDS)
        return self.agent is not None and (self.agent.is_gone or self.agent.silence >= limit)


class Nodes:
    """The agents of the other nodes, as they arrive, are lost and are replaced.

    An agent that arrives is admitted if its node has none: at once at the start of the job, later when the one before
    it is lost. An agent that counts as lost but lives, behind a broken network, learns that from the store, and ends.

    Args:
        store: The supervisor's.
        layout: The nodes.
        notices: What the coordinator has decided. Only the first agent of a node reads the notices of before.
        ring: Called when an agent was admitted.
        node_timeout: Seconds to wait for a lost node.
        now: The time.

    """

    def __init__(
        self,
        store: Store,
        layout: Layout,
        notices: Notices,
        ring: Callable[[], None],
        node_timeout: float,
        now: float,
    ) -> None:
        self._store = store
        self._notices = notices
        self._ring = ring
        self._node_timeout = node_timeout
        self._nodes = [_Node(number, tuple(layout.slots(number)), now) for number in range(1, layout.nodes)]
        self._checked_at = now

    def handle(self, event: Arrived) -> None:
        """Note that an agent waits to be admitted."""
        self._nodes[event.node - 1].waiting = _Agent(event.agent)

    def disconnect(self, name: str) -> None:
        """Note that the connection of an agent broke. One that vanishes with its host falls silent instead."""
        for node in self._nodes:
            if node.agent is not None and name == agent_name(node.number, node.agent.number):
                node.agent.is_gone = True
            if node.waiting is not None and name == agent_name(node.number, node.waiting.number):
                node.waiting = None

    def changes(self, now: float) -> Iterator[Change]:
        """Yield which nodes were lost or are back since the last call, and admit agents.

        An agent skips the notices of before its admission. So the caller publishes what follows from a change before
        it asks for the next one.
        """
        if now - self._checked_at >= BEAT_SECONDS:
            self._checked_at = now
            for node in self._nodes:
                self._listen(node)
        for node in self._nodes:
            if node.is_lost:
                yield self._lose(node, now)
            if node.waiting is not None and node.agent is None:
                yield from self._admit(node, node.waiting)
            if self._is_overdue(node, now):
                yield self._give_up(node)

    def all_left(self) -> bool:
        """Return whether no other node's agent needs the store any more."""
        there = [node for node in self._nodes if node.agent or node.waiting]
        return all(self._store.check([left_key(node.number)]) for node in there)

    def _listen(self, node: _Node) -> None:
        for agent in (node.agent, node.waiting):
            if agent is not None:
                agent.listen(self._store.add(heartbeat_key(node.number, agent.number), 0))
        if node.waiting is not None and node.waiting.silence >= SILENCE_SECONDS:
            node.waiting = None

    def _lose(self, node: _Node, now: float) -> Lost:
        assert node.agent is not None
        self._store.set(loss_key(node.number, node.agent.number), "")
        node.agent, node.since, node.is_given_up = None, now, self._node_timeout == 0
        return Lost(node.number, node.slots, for_good=node.is_given_up)

    def _admit(self, node: _Node, agent: _Agent) -> Iterator[Back]:
        node.waiting = None
        if self._store.check([loss_key(node.number, agent.number)]):
            # It stopped waiting.
            return
        is_first, node.was_there = not node.was_there, True
        node.agent, node.is_given_up = agent, False
        # Notices for the agent before it are not meant for this one.
        key = admission_key(node.number, agent.number)
        self._store.set(key, str(0 if is_first else self._notices.length))
        # It can be read when the store answers a question after it.
        self._store.check([key])
        self._ring()
        if not is_first:
            yield Back(node.number, node.slots)

    def _is_overdue(self, node: _Node, now: float) -> bool:
        return node.agent is None and not node.is_given_up and now - node.since > self._patience(node)

    def _patience(self, node: _Node) -> float:
        return self._node_timeout if node.was_there else JOIN_SECONDS

    def _give_up(self, node: _Node) -> Lost:
        node.is_given_up = True
        how = "was lost and has not come back" if node.was_there else "has not come"
        return Lost(node.number, node.slots, f"{how} within {self._patience(node):g} s", for_good=True)
