"""Node 0: it passes events to the coordinator and publishes what that decides."""

import time
from collections.abc import Callable

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_scar.elastic.protocol.log import Events, Notices
from lightning_scar.elastic.protocol.messages import Arrived, Notice, Spawn
from lightning_scar.elastic.supervisor.agent import port_key
from lightning_scar.elastic.supervisor.coordinator import Coordinator
from lightning_scar.elastic.supervisor.gate import loopback_store
from lightning_scar.elastic.supervisor.job import Layout
from lightning_scar.elastic.supervisor.nodes import Nodes
from lightning_scar.elastic.supervisor.policy import Policy
from lightning_scar.elastic.supervisor.wakeups import Wakeups

#: Seconds that agents have to read the last notice before the store closes.
_LAST_NOTICE_SECONDS = 10.0
_CHECK_SECONDS = 0.05


class NodeZero:
    """The owner of the coordinator.

    Args:
        store: The supervisor's. It has the log of events.
        layout: The nodes.
        policy: What the user chose.
        wakeups: This supervisor's.
        tell_user: Called with each line that the user should read.

    """

    def __init__(
        self, store: TCPStore, layout: Layout, policy: Policy, wakeups: Wakeups, tell_user: Callable[[str], None]
    ) -> None:
        self._store = store
        self._events = Events(store)
        self._notices = Notices(store, wakeups.ring)
        self._wakeups = wakeups
        self._coordinator = Coordinator(layout.world_size, policy, tell_user, layout.per_node)
        self._nodes = Nodes(store, layout, self._notices, wakeups.ring, policy.node_timeout, time.monotonic())
        self._attempt = -1
        self._group_store = store
        self._publish(self._coordinator.start(time.monotonic()))

    def step(self) -> None:
        """Handle what has happened."""
        now = time.monotonic()
        for event in self._events.news():
            if isinstance(event, Arrived):
                self._nodes.handle(event)
            else:
                self._publish(self._coordinator.handle(event, now))
        for name in self._wakeups.gone():
            self._nodes.disconnect(name)
        for change in self._nodes.changes(now):
            self._publish(self._coordinator.handle(change, now))
        self._publish(self._coordinator.tick(now))

    def wait_for_agents(self) -> None:
        """Wait until the other nodes have read that the job is over."""
        deadline = time.monotonic() + _LAST_NOTICE_SECONDS
        self.step()
        while time.monotonic() < deadline and not self._nodes.all_left():
            self._wakeups.wait(_CHECK_SECONDS)
            # An agent that has just arrived must read it, too.
            self.step()

    def _publish(self, notices: list[Notice]) -> None:
        for notice in notices:
            if isinstance(notice, Spawn) and notice.attempt > self._attempt:
                self._open_group_store(notice.attempt)
        self._notices.append(*notices)

    def _open_group_store(self, attempt: int) -> None:
        # Scripts form their group over a store of this process, after a restart over a new one: in the old one they
        # would meet the addresses of dead workers (pytorch #135712).
        self._attempt = attempt
        if attempt > 0:
            self._group_store = loopback_store()
        self._store.set(port_key(attempt), str(self._group_store.port))
