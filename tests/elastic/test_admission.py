"""Which agents run the workers of their nodes, as node 0 and they find out over a real store and real connections."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from torch.distributed import TCPStore

from lightning_scar.elastic.protocol.log import Events, Notices
from lightning_scar.elastic.protocol.messages import Arrived, Back, Change, Lost, Stop
from lightning_scar.elastic.supervisor import admission as admissions
from lightning_scar.elastic.supervisor.admission import Admission, NotAdmittedError, arrive, heartbeat_key, loss_key
from lightning_scar.elastic.supervisor.agent import Layout
from lightning_scar.elastic.supervisor.line import Line, Lines
from lightning_scar.elastic.supervisor.nodes import Nodes


class NodeZero:
    """What runs there, with a clock of its own."""

    def __init__(self, nodes: int = 2, node_timeout: float = 600) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.events = Events.create(self.store)
        self.notices = Notices(self.store)
        self.nodes = Nodes(self.store, Layout(0, nodes, per_node=2), self.notices, node_timeout, now=0.0)

    def changes(self, now: float = 0.0) -> list[Change]:
        for event in self.events.news():
            assert isinstance(event, Arrived)
            self.nodes.arrived(event)
        return list(self.nodes.changes(now))

    def changes_soon(self) -> list[Change]:
        deadline = time.monotonic() + 10
        while not (changes := self.changes()):
            assert time.monotonic() < deadline, "nothing has changed"
            time.sleep(0.01)
        return changes

    def admit(self, node: int = 1) -> Admission:
        """A new agent of a node, which has none that lives."""
        found: list[Admission] = []
        client = TCPStore("127.0.0.1", self.store.port, is_master=False, wait_for_workers=False)
        thread = threading.Thread(target=lambda: found.append(come(client, node)))
        thread.start()
        while thread.is_alive():
            self.changes()
            thread.join(0.01)
        return found[0]


def come(store: TCPStore, node: int = 1, stops: bool = False) -> Admission:
    return arrive(store, "127.0.0.1", node, stops=lambda: stops, on_end=lambda: None)


@pytest.fixture
def zero() -> Iterator[NodeZero]:
    zero = NodeZero()
    yield zero
    zero.nodes.close()


def test_the_first_agent_hears_everything(zero: NodeZero) -> None:
    zero.notices.append(Stop("before it came"))
    admission = zero.admit()
    assert (admission.agent, admission.heard) == (1, 0)
    assert zero.changes(29) == []


def test_an_agent_that_is_killed_is_lost_at_once_and_the_next_one_is_admitted(zero: NodeZero) -> None:
    first = zero.admit()
    first.close()
    assert zero.changes_soon() == [Lost(1, (2, 3))]
    assert zero.store.check([loss_key(1, 1)])
    zero.notices.append(Stop("what the first one should do"))
    admission = zero.admit()
    # What was said to the one before is not for this one.
    assert (admission.agent, admission.heard) == (2, 1)
    assert not zero.store.check([loss_key(1, 2)])


def test_who_waits_while_the_one_before_is_lost_is_back_at_once(zero: NodeZero) -> None:
    first = zero.admit()
    zero.events.append(Arrived(1, 2))
    assert zero.changes() == []
    first.close()
    assert zero.changes_soon() == [Lost(1, (2, 3)), Back(1, (2, 3))]


def test_an_agent_that_falls_silent_is_lost_once(zero: NodeZero) -> None:
    admission = zero.admit()
    zero.store.add(heartbeat_key(1, 1), 1)
    assert zero.changes(20) == []
    assert zero.changes(49) == []
    assert zero.changes(51) == [Lost(1, (2, 3))]
    assert zero.changes(100) == []
    admission.close()


def test_a_node_that_stays_away_is_given_up_once(zero: NodeZero) -> None:
    first = zero.admit()
    first.close()
    assert zero.changes_soon() == [Lost(1, (2, 3))]
    assert zero.changes(599) == []
    how = "was lost and has not come back within 600 s"
    assert zero.changes(601) == [Lost(1, (2, 3), how, for_good=True)]
    assert zero.changes(2000) == []


def test_a_node_that_never_comes_is_given_up(zero: NodeZero) -> None:
    assert zero.changes(599) == []
    assert zero.changes(601) == [Lost(1, (2, 3), "has not come within 600 s", for_good=True)]


def test_no_patience_at_all() -> None:
    zero = NodeZero(node_timeout=0)
    zero.admit().close()
    assert zero.changes_soon() == [Lost(1, (2, 3), for_good=True)]
    zero.nodes.close()


def test_a_node_with_two_agents(zero: NodeZero, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admissions, "SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(admissions, "_GRACE_SECONDS", 0.1)
    first = zero.admit()
    with pytest.raises(NotAdmittedError):
        come(zero.store)
    # It has gone, and is not admitted when the first one is lost.
    assert zero.changes() == []
    first.close()
    assert zero.changes_soon() == [Lost(1, (2, 3))]
    assert zero.changes() == []


def test_who_is_told_to_stop_waits_no_longer(zero: NodeZero) -> None:
    first = zero.admit()
    with pytest.raises(NotAdmittedError):
        come(zero.store, stops=True)
    # Without a line, too, that is known.
    zero.store.set(loss_key(1, 3), "")
    zero.events.append(Arrived(1, 3))
    first.close()
    assert zero.changes_soon() == [Lost(1, (2, 3))]
    assert zero.changes() == []


def test_a_new_agent_begins_to_listen_behind_all_that_was_said_of_the_one_before(zero: NodeZero) -> None:
    first = zero.admit()
    client = TCPStore("127.0.0.1", zero.store.port, is_master=False, wait_for_workers=False)
    found: list[Admission] = []
    thread = threading.Thread(target=lambda: found.append(come(client)))
    thread.start()
    first.close()
    while thread.is_alive():
        for event in zero.events.news():
            zero.nodes.arrived(event)  # type: ignore[arg-type]
        for change in zero.nodes.changes(0.0):
            # As the coordinator does.
            zero.notices.append(Stop(repr(change)))
        thread.join(0.01)
    assert found[0].heard == 1


def test_a_node_that_is_lost_once_more_is_given_up_once_more(zero: NodeZero) -> None:
    zero.admit().close()
    assert zero.changes_soon() == [Lost(1, (2, 3))]
    assert [change.for_good for change in zero.changes(601) if isinstance(change, Lost)] == [True]
    zero.admit().close()
    assert Lost(1, (2, 3)) in zero.changes_soon()
    assert [change.for_good for change in zero.changes(1300) if isinstance(change, Lost)] == [True]


def test_an_agent_notices_that_node_0_is_gone(zero: NodeZero) -> None:
    gone = threading.Event()
    lines = Lines()
    line = Line("127.0.0.1", lines.port, "1.1", gone.set)
    assert lines.ended() == []
    assert not gone.is_set()
    lines.close()
    assert gone.wait(10)
    line.close()


def test_who_says_nothing_or_too_much_on_a_line_is_nobody() -> None:
    lines = Lines()
    strangers = [socket.create_connection(("127.0.0.1", lines.port)) for _ in range(3)]
    strangers[1].sendall(b"x" * 1000)
    strangers[2].sendall(b"half a na")
    known = Line("127.0.0.1", lines.port, "1.1", on_end=lambda: None)
    for line in (*strangers, known):
        line.close()
    ended: list[str] = []
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
        ended += lines.ended()
    assert ended == ["1.1"]
    lines.close()
