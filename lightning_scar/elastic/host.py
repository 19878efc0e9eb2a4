"""What runs on node 0 only: it feeds the coordinator and publishes what that decides."""

import time
from collections.abc import Callable

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_scar.elastic.agent import Layout, heartbeat_key, left_key, port_key
from lightning_scar.elastic.coordinator import Coordinator
from lightning_scar.elastic.journal import Events, Notices
from lightning_scar.elastic.messages import Lost, Notice, Spawn
from lightning_scar.elastic.restarts import Policy

#: A node counts as gone when its agent has given no sign of life for so many seconds.
SILENCE_SECONDS = 30.0
#: Seconds that the nodes have to show up at the start.
JOIN_SECONDS = 600.0
#: Seconds that agents have to read the last notice, before the store goes.
_FAREWELL_SECONDS = 10.0


class Host:
    """Owner of the coordinator.

    Args:
        store: The supervisor's.
        layout: The nodes.
        policy: What the user chose.
        say: Tells the user a line.

    """

    def __init__(self, store: TCPStore, layout: Layout, policy: Policy, say: Callable[[str], None]) -> None:
        self._store = store
        self._events = Events.create(store)
        self._notices = Notices(store)
        self._coordinator = Coordinator(layout.world_size, policy, say)
        self._watch = _Watch(store, layout)
        self._attempt = -1
        self._group_store = store
        self._publish(self._coordinator.start(time.monotonic()))

    def step(self) -> None:
        """Takes in what happened."""
        now = time.monotonic()
        for lost in self._watch.lost(now):
            self._events.append(lost)
        for event in self._events.news():
            self._publish(self._coordinator.take(event, now))
        self._publish(self._coordinator.tick(now))

    def wait_for_agents(self) -> None:
        """Waits until the other nodes have read that the job is over."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while time.monotonic() < deadline and not self._watch.all_left():
            time.sleep(0.05)

    def _publish(self, notices: list[Notice]) -> None:
        for notice in notices:
            if isinstance(notice, Spawn) and notice.attempt > self._attempt:
                self._open_group_store(notice.attempt)
            self._notices.append(notice)

    def _open_group_store(self, attempt: int) -> None:
        # Scripts form their group over a store of this process, and a second time never over the same: they would
        # meet the addresses of workers that are gone (pytorch #135712).
        self._attempt = attempt
        if attempt > 0:
            self._group_store = TCPStore(self._store.host, 0, is_master=True, wait_for_workers=False)
        self._store.set(port_key(attempt), str(self._group_store.port))


class _Watch:
    """Tells which nodes have fallen silent. Beats are compared with each other, never with a clock."""

    def __init__(self, store: TCPStore, layout: Layout) -> None:
        self._store = store
        self._layout = layout
        now = time.monotonic()
        self._beats = dict.fromkeys(range(1, layout.nodes), 0)
        self._heard = dict.fromkeys(self._beats, now)
        self._looked = now

    def lost(self, now: float) -> list[Lost]:
        """The nodes that have just been lost."""
        if now - self._looked < 1:
            return []
        self._looked = now
        gone = [node for node in self._beats if self._is_silent(node, now)]
        for node in gone:
            del self._beats[node]
        return [Lost(node, tuple(self._layout.slots(node))) for node in gone]

    def all_left(self) -> bool:
        """Whether no other node's agent needs the store any more."""
        # Who has just come may not have been looked at yet.
        there = [node for node in self._beats if self._store.add(heartbeat_key(node), 0)]
        return all(self._store.check([left_key(node)]) for node in there)

    def _is_silent(self, node: int, now: float) -> bool:
        beat = self._store.add(heartbeat_key(node), 0)
        if beat != self._beats[node]:
            self._beats[node], self._heard[node] = beat, now
        return now - self._heard[node] > (SILENCE_SECONDS if beat else JOIN_SECONDS)
