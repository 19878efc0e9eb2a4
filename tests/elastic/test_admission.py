"""Which agents run the workers of their nodes, as node 0 and they find out over a real store."""

import threading
from collections.abc import Callable

import pytest
from torch.distributed import TCPStore

from lightning_scar.elastic.protocol.log import Events, Notices
from lightning_scar.elastic.protocol.messages import Arrived, Back, Change, Lost, Stop
from lightning_scar.elastic.supervisor import admission as admissions
from lightning_scar.elastic.supervisor.admission import Admission, NotAdmittedError, arrive, beat, loss_key
from lightning_scar.elastic.supervisor.agent import Layout
from lightning_scar.elastic.supervisor.nodes import Nodes

LOST, BACK = Lost(1, (2, 3)), Back(1, (2, 3))


class NodeZero:
    """What runs there, with a clock of its own."""

    def __init__(self, node_timeout: float = 600) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.events = Events.create(self.store)
        self.notices = Notices(self.store)
        self.now = 0.0
        self.nodes = Nodes(self.store, Layout(0, 2, per_node=2), self.notices, node_timeout, self.now)

    def changes(self, publish: Callable[[Change], None] = lambda _: None) -> list[Change]:
        for event in self.events.news():
            assert isinstance(event, Arrived)
            self.nodes.handle(event)
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

    def admit(self) -> Admission:
        """A new agent of a node which has none."""
        found: list[Admission] = []
        thread = threading.Thread(target=lambda: found.append(come(self.client())))
        thread.start()
        while thread.is_alive():
            self.changes()
            thread.join(0.01)
        return found[0]

    def client(self) -> TCPStore:
        return TCPStore("127.0.0.1", self.store.port, is_master=False, wait_for_workers=False)


def come(store: TCPStore, stops: bool = False) -> Admission:
    return arrive(store, 1, stops=lambda: stops)


@pytest.fixture
def zero() -> NodeZero:
    return NodeZero()


def test_the_first_agent_hears_everything(zero: NodeZero) -> None:
    zero.notices.append(Stop("before it came"))
    assert zero.admit() == Admission(agent=1, skipped=0)


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
    assert zero.admit() == Admission(agent=2, skipped=1)
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
        come(zero.store)
    # It has gone, and is not admitted when the first one is lost.
    assert zero.later(12) == [LOST]


def test_who_is_told_to_stop_waits_no_longer(zero: NodeZero) -> None:
    zero.admit()
    with pytest.raises(NotAdmittedError):
        come(zero.store, stops=True)
    assert zero.later(12) == [LOST]


def test_a_new_agent_begins_to_listen_behind_all_that_was_said_of_the_one_before(zero: NodeZero) -> None:
    zero.admit()
    found: list[Admission] = []
    thread = threading.Thread(target=lambda: found.append(come(zero.client())))
    thread.start()
    while thread.is_alive():
        zero.now += 1
        # As the coordinator does.
        zero.changes(lambda change: zero.notices.append(Stop(repr(change))))
        thread.join(0.01)
    assert found[0].skipped == 1


def test_a_node_that_is_lost_once_more_is_given_up_once_more(zero: NodeZero) -> None:
    for _ in range(2):
        zero.admit()
        assert [change.for_good for change in zero.later(700) if isinstance(change, Lost)] == [False, True]
