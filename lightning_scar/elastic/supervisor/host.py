"""What runs on node 0 only: it feeds the coordinator and publishes what that decides."""

import time
from collections.abc import Callable

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_scar.elastic.protocol.log import Events, Notices
from lightning_scar.elastic.protocol.messages import Arrived, Notice, Spawn
from lightning_scar.elastic.supervisor.agent import Layout, port_key
from lightning_scar.elastic.supervisor.coordinator import Coordinator
from lightning_scar.elastic.supervisor.nodes import Nodes
from lightning_scar.elastic.supervisor.policy import Policy

#: Seconds that agents have to read the last notice, before the store goes.
_FAREWELL_SECONDS = 10.0


class Host:
    """Owner of the coordinator.

    Args:
        store: The supervisor's, in which the log of events has begun.
        layout: The nodes.
        policy: What the user chose.
        say: Tells the user a line.

    """

    def __init__(self, store: TCPStore, layout: Layout, policy: Policy, say: Callable[[str], None]) -> None:
        self._store = store
        self._events = Events(store)
        self._notices = Notices(store)
        self._coordinator = Coordinator(layout.world_size, policy, say)
        self._nodes = Nodes(store, layout, self._notices, policy.node_timeout, time.monotonic())
        self._attempt = -1
        self._group_store = store
        self._publish(self._coordinator.start(time.monotonic()))

    def step(self) -> None:
        """Takes in what happened."""
        now = time.monotonic()
        for event in self._events.news():
            if isinstance(event, Arrived):
                self._nodes.handle(event)
            else:
                self._publish(self._coordinator.handle(event, now))
        for change in self._nodes.changes(now):
            self._publish(self._coordinator.handle(change, now))
        self._publish(self._coordinator.tick(now))

    def wait_for_agents(self) -> None:
        """Waits until the other nodes have read that the job is over."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        self.step()
        while time.monotonic() < deadline and not self._nodes.all_left():
            time.sleep(0.05)
            # Who has just come is to hear it, too.
            self.step()

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
