"""Which agents run the workers of their nodes, as node 0 and they find out over a real store."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore

from lightning_scar.elastic.protocol.log import Events, Notices
from lightning_scar.elastic.protocol.messages import Arrived, Back, Change, Lost, Stop
from lightning_scar.elastic.supervisor import admission as admissions
from lightning_scar.elastic.supervisor.admission import (
    Admission,
    NotAdmittedError,
    agent_name,
    arrive,
    beat,
    loss_key,
)
from lightning_scar.elastic.supervisor.job import Layout
from lightning_scar.elastic.supervisor.nodes import Nodes
from lightning_scar.elastic.supervisor.wakeups import Wakeups

LOST, BACK = Lost(1, (2, 3)), Back(1, (2, 3))


class NodeZero:
    """What runs there, with a clock of its own."""

    def __init__(self, node_timeout: float = 600) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.events = Events.create(self.store)
        self.notices = Notices(self.store)
        self.wakeups = Wakeups()
        self.now = 0.0
        layout = Layout(0, 2, per_node=2)
        self.nodes = Nodes(self.store, layout, self.notices, self.wakeups.ring, node_timeout, self.now)

    def changes(self, publish: Callable[[Change], None] = lambda _: None) -> list[Change]:
        for event in self.events.news():
            assert isinstance(event, Arrived)
            self.nodes.handle(event)
        for name in self.wakeups.gone():
            self.nodes.disconnect(name)
        changes = []
        for change in self.nodes.changes(self.now):
            publish(change)
            changes.append(change)
        return changes

    def later(self, seconds: int, beating: int = 0) -> list[Change]:
        """What changes within so many seconds, in which an agent may live."""
        changes = self.changes()
        for _ in range(seconds):
            if beating:
                beat(self.store, 1, beating)
            self.now += 1
            changes += self.changes()
        return changes

    def admit(
        self, publish: Callable[[Change], None] = lambda _: None, moment: float = 0.0
    ) -> tuple[Admission, Wakeups]:
        """A new agent of a node which has none, and what its process holds open."""
        wakeups = Wakeups(node_0=self.wakeups.port)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(come, self, wakeups)
            while not future.done():
                self.now += moment
                self.changes(publish)
                self.wakeups.wait(0.01)
        return future.result(), wakeups


def come(zero: NodeZero, wakeups: Wakeups, stops: bool = False) -> Admission:
    store = TCPStore("127.0.0.1", zero.store.port, is_master=False, wait_for_workers=False)
    return arrive(store, 1, wakeups, stops=lambda: stops)


@pytest.fixture
def zero() -> NodeZero:
    return NodeZero()


def test_the_first_agent_hears_everything(zero: NodeZero) -> None:
    zero.notices.append(Stop("before it came"))
    assert zero.admit()[0] == Admission(agent=1, skipped=0)


def test_an_agent_that_falls_silent_is_lost_once_and_the_next_one_is_admitted(zero: NodeZero) -> None:
    zero.admit()
    assert zero.later(20, beating=1) == []
    # What was heard of it last may be a moment old.
    assert zero.later(9) == []
    assert zero.later(2) == [LOST]
    assert zero.later(100) == []
    assert zero.store.check([loss_key(1, 1)])
    zero.notices.append(Stop("what the first one should do"))
    # What was said to the one before is not for this one.
    assert zero.admit()[0] == Admission(agent=2, skipped=1)
    assert not zero.store.check([loss_key(1, 2)])


def test_an_agent_that_is_slow_is_not_lost(zero: NodeZero) -> None:
    zero.admit()
    for _ in range(10):
        assert zero.later(8) + zero.later(1, beating=1) == []


def test_nobody_is_silent_while_node_0_itself_was_stopped(zero: NodeZero) -> None:
    zero.admit()
    zero.later(1, beating=1)
    zero.now += 1000
    assert zero.changes() == []


def test_a_silent_agent_in_whose_place_another_one_was_started_is_lost_sooner(zero: NodeZero) -> None:
    zero.admit()
    zero.later(1, beating=1)
    zero.events.append(Arrived(1, 2))
    assert zero.later(2) == []
    assert zero.later(2, beating=2) == [LOST, BACK]


def test_a_slow_agent_keeps_its_place_when_another_one_comes(zero: NodeZero) -> None:
    zero.admit()
    zero.events.append(Arrived(1, 2))
    for _ in range(10):
        assert zero.later(2) + zero.later(1, beating=1) == []


def test_who_dies_while_it_waits_is_not_admitted(zero: NodeZero) -> None:
    zero.admit()
    zero.events.append(Arrived(1, 2))
    assert zero.later(12, beating=1) == []
    assert zero.later(12) == [LOST]


def test_a_node_that_stays_away_is_given_up_once(zero: NodeZero) -> None:
    zero.admit()
    assert zero.later(12) == [LOST]
    assert zero.later(580) == []
    how = "was lost and has not come back within 600 s"
    assert zero.later(30) == [Lost(1, (2, 3), how, for_good=True)]
    assert zero.later(600) == []


def test_a_node_that_never_comes_is_given_up(zero: NodeZero) -> None:
    assert zero.later(599) == []
    assert zero.later(2) == [Lost(1, (2, 3), "has not come within 600 s", for_good=True)]


def test_no_patience_at_all() -> None:
    zero = NodeZero(node_timeout=0)
    zero.admit()
    assert zero.later(12) == [Lost(1, (2, 3), for_good=True)]


def test_a_node_with_two_agents(zero: NodeZero, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admissions, "SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(admissions, "_GRACE_SECONDS", 0.1)
    zero.admit()
    with pytest.raises(NotAdmittedError):
        come(zero, Wakeups())
    # It has gone, and is not admitted when the first one is lost.
    assert zero.later(12) == [LOST]


def test_who_is_told_to_stop_waits_no_longer(zero: NodeZero) -> None:
    zero.admit()
    with pytest.raises(NotAdmittedError):
        come(zero, Wakeups(), stops=True)
    assert zero.later(12) == [LOST]


def test_a_new_agent_begins_to_listen_behind_all_that_was_said_of_the_one_before(zero: NodeZero) -> None:
    zero.admit()
    # As the coordinator does.
    admission, _ = zero.admit(lambda change: zero.notices.append(Stop(repr(change))), moment=1)
    assert admission.skipped == 1


def test_a_node_that_is_lost_once_more_is_given_up_once_more(zero: NodeZero) -> None:
    for _ in range(2):
        zero.admit()
        assert [change.for_good for change in zero.later(700) if isinstance(change, Lost)] == [False, True]


# -- connections that break -------------------------------------------------------------------------------------------


def hear_of_the_end(zero: NodeZero, wakeups: Wakeups) -> list[Change]:
    """What changes when a process is gone: the system closes what it held open."""
    wakeups.close()
    changes: list[Change] = []
    deadline = time.monotonic() + 30
    while not changes and time.monotonic() < deadline:
        zero.wakeups.wait(1)
        changes = zero.changes()
    return changes


def test_an_agent_whose_process_ends_is_lost_at_once_and_the_next_one_is_admitted(zero: NodeZero) -> None:
    _, wakeups = zero.admit()
    assert zero.changes() == []
    assert hear_of_the_end(zero, wakeups) == [LOST]
    assert zero.later(100) == []
    assert zero.store.check([loss_key(1, 1)])
    assert zero.admit()[0].agent == 2


def test_an_agent_that_waits_takes_the_place_of_one_whose_process_ends(zero: NodeZero) -> None:
    _, wakeups = zero.admit()
    zero.events.append(Arrived(1, 2))
    assert hear_of_the_end(zero, wakeups) == [LOST, BACK]


def test_an_agent_whose_process_ends_while_it_waits_is_not_admitted(zero: NodeZero) -> None:
    _, first = zero.admit()
    second = Wakeups(node_0=zero.wakeups.port)
    second.introduce(agent_name(1, 2))
    zero.events.append(Arrived(1, 2))
    assert zero.changes() == []
    second.close()
    # It was there, had a name, and is gone.
    for _ in range(3):
        zero.wakeups.wait(0.1)
    assert zero.changes() == []
    assert hear_of_the_end(zero, first) == [LOST]


def test_the_end_of_an_agent_that_was_lost_before_is_no_news(zero: NodeZero) -> None:
    _, wakeups = zero.admit()
    assert zero.later(12) == [LOST]
    zero.admit()
    wakeups.close()
    zero.wakeups.wait(1)
    assert zero.changes() == []
