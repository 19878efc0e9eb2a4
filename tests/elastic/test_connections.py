"""The sockets of a group: which are shut down, and which never."""

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from lightning_scar.elastic.worker.sockets import Connections


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def connect() -> Callable[[], TCPStore]:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    timeout = timedelta(seconds=20)
    return lambda: TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=timeout)


class Listener:
    """Where a member waits for another one; or anything else that listens."""

    def __init__(self, stack: ExitStack, host: str = "127.0.0.1") -> None:
        self.family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = stack.enter_context(socket.create_server((host, 0), family=self.family))
        self._stack = stack

    def publish(self, store: Store) -> None:
        """As gloo does: the system's structure, amid other bytes."""
        host, port, *_ = self.socket.getsockname()
        ip = socket.inet_pton(self.family, host)
        flow = b"\0" * 4 if self.family == socket.AF_INET6 else b""
        value = b"\x02\0" + self.family.to_bytes(2, "little") + struct.pack("!H", port) + flow + ip + b"\0" * 100
        store.set(f"address/{port}", value)  # type: ignore[arg-type]

    def pair(self) -> tuple[socket.socket, socket.socket]:
        one = self._stack.enter_context(socket.create_connection(self.socket.getsockname()[:2], timeout=0.1))
        return one, self._stack.enter_context(self.socket.accept()[0])


def is_cut(one: socket.socket) -> bool:
    try:
        return one.recv(1) == b""
    except TimeoutError:
        return False


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_what_members_published_is_cut_and_nothing_else(
    stack: ExitStack, connect: Callable[[], TCPStore], host: str
) -> None:
    connections = Connections()
    try:
        group, other = Listener(stack, host), Listener(stack, host)
    except OSError:
        pytest.skip("no IPv6")
    with connections.forming(connect) as store:
        group.publish(store)
        meanwhile, _ = other.pair()
        connected, _ = group.pair()
    connections.cut()
    assert (is_cut(meanwhile), is_cut(connected)) == (False, True)
    # The listening socket goes on.
    group.pair()


def test_the_connection_to_the_store_is_cut_and_no_other_one_to_it(connect: Callable[[], TCPStore]) -> None:
    connections, before = Connections(), connect()
    with connections.forming(connect) as store:
        store.set("key", "value")
        after = connect()
    connections.cut()
    assert before.get("key") == after.get("key") == b"value"
    with pytest.raises(dist.DistError):
        store.get("key")


def test_a_cut_while_they_are_opened_takes_those_that_are_yet_to_come_too(
    stack: ExitStack, connect: Callable[[], TCPStore]
) -> None:
    connections, listener = Connections(), Listener(stack)
    with connections.forming(connect) as store:
        listener.publish(store)
        first, _ = listener.pair()
        connections.cut()
        assert is_cut(first)
        second, _ = listener.pair()
        deadline = time.monotonic() + 10
        while not is_cut(second) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert is_cut(second)


def test_a_cut_of_a_group_that_never_formed_leaves_the_next_one_alone(
    stack: ExitStack, connect: Callable[[], TCPStore]
) -> None:
    connections, listener = Connections(), Listener(stack)
    with connections.forming(connect):
        connections.cut()
    with connections.forming(connect) as store:
        listener.publish(store)
        connected, _ = listener.pair()
        store.set("key", "value")
        time.sleep(0.1)
        assert store.get("key") == b"value"
        assert not is_cut(connected)


def test_what_was_opened_for_an_earlier_group_is_left_alone(stack: ExitStack, connect: Callable[[], TCPStore]) -> None:
    connections, first, second = Connections(), Listener(stack), Listener(stack)
    with connections.forming(connect) as store:
        first.publish(store)
    earlier, _ = first.pair()
    with connections.forming(connect) as store:
        second.publish(store)
    later, _ = second.pair()
    connections.cut()
    assert (is_cut(earlier), is_cut(later)) == (False, True)


def test_a_connection_is_not_cut_while_it_is_made(connect: Callable[[], TCPStore]) -> None:
    connections = Connections()

    def connect_slowly() -> TCPStore:
        made = connect()
        connections.cut()
        made.set("key", "value")
        assert made.get("key") == b"value"
        return made

    with connections.forming(connect_slowly):
        connections.cut()


def test_after_a_cut_whoever_gets_the_same_address_is_left_alone(
    stack: ExitStack, connect: Callable[[], TCPStore]
) -> None:
    connections, listener = Connections(), Listener(stack)
    with connections.forming(connect) as store:
        listener.publish(store)
    connections.cut()
    other, _ = listener.pair()
    connections.cut()
    assert not is_cut(other)


def test_cutting_nothing_is_no_error() -> None:
    Connections().cut()


def test_a_groups_store_is_one_as_any_other(connect: Callable[[], TCPStore]) -> None:
    with Connections().forming(connect) as store:
        group = PrefixStore("group", store)
        group.set("key", "value")
        assert (group.get("key"), group.check(["key"]), group.check(["other"])) == (b"value", True, False)
        assert (group.add("number", 2), group.add("number", 3)) == (2, 5)
        assert group.compare_set("key", "value", "next") == b"next"
        assert group.num_keys() > 0
        assert (group.delete_key("key"), group.delete_key("key")) == (True, False)
        group.set_timeout(timedelta(milliseconds=100))
        for ask in (lambda: group.get("key"), lambda: group.wait(["key"])):
            with pytest.raises(dist.DistError):
                ask()


# -- a real group -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(dist, "ProcessGroupGloo"), reason="no gloo")
@pytest.mark.parametrize("is_whole", [True, False])
def test_of_a_group_of_gloo_all_is_cut_and_nothing_that_another_thread_opens_meanwhile(
    stack: ExitStack, connect: Callable[[], TCPStore], monkeypatch: pytest.MonkeyPatch, is_whole: bool
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", next(name for _, name in socket.if_nameindex() if name.startswith("lo")))
    other, opened = Listener(stack), []
    members = [Connections() for _ in range(3)]

    def form(rank: int) -> Any:
        with members[rank].forming(connect) as store:
            # All sockets of all threads are this process's: each member opens one of its own amid those of the groups.
            opened.append(other.pair()[0])
            group = dist.ProcessGroupGloo(PrefixStore("group", store), rank, 3, timedelta(seconds=60))
            opened.append(other.pair()[0])
        # A subgroup, which forms later, is blocked and woken as well.
        return group if is_whole else dist.ProcessGroupGloo(PrefixStore("sub", store), rank, 3, timedelta(seconds=60))

    with ThreadPoolExecutor(3) as pool:
        groups = list(pool.map(form, range(3)))

        def reduce(rank: int) -> float:
            tensor = torch.ones(1)
            groups[rank].allreduce([tensor], dist.AllreduceOptions()).wait()
            return float(tensor)

        assert list(pool.map(reduce, range(3))) == [3.0] * 3
        # Rank 2 does not take part; the other two are blocked.
        blocked = [pool.submit(reduce, rank) for rank in (0, 1)]
        members[0].cut()
        for future in blocked:
            assert isinstance(future.exception(30), RuntimeError)
    assert len(opened) == 6
    assert not any(map(is_cut, opened))


def test_no_descriptor_is_left_open(connect: Callable[[], TCPStore]) -> None:
    connections = Connections()
    with connections.forming(connect):
        pass
    with open(os.devnull, "rb"):
        before = len(os.listdir("/dev/fd"))
        connections.cut()
        # The other end of the connection to the store is in this process, too.
        assert len(os.listdir("/dev/fd")) <= before
