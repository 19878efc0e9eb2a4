"""The sockets of a group: which are shut down, and which never."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lightning_scar.elastic.worker.sockets import Connections


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair()
    one.settimeout(0.1)
    return stack.enter_context(one), stack.enter_context(other)


def is_cut(one: socket.socket) -> bool:
    try:
        return one.recv(1) == b""
    except TimeoutError:
        return False


def test_only_what_was_opened_meanwhile_is_cut(stack: ExitStack) -> None:
    connections = Connections()
    before, _ = pair(stack)
    with connections.recorded():
        meanwhile, _ = pair(stack)
    after, _ = pair(stack)
    connections.cut()
    assert (is_cut(before), is_cut(meanwhile), is_cut(after)) == (False, True, False)


def test_a_cut_while_they_are_opened_takes_those_that_are_yet_to_come_too(stack: ExitStack) -> None:
    connections = Connections()
    with connections.recorded():
        first, _ = pair(stack)
        connections.cut()
        assert is_cut(first)
        second, _ = pair(stack)
        deadline = time.monotonic() + 10
        while not is_cut(second) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert is_cut(second)
    third, _ = pair(stack)
    assert not is_cut(third)


def test_what_was_opened_for_an_earlier_group_is_left_alone(stack: ExitStack) -> None:
    connections = Connections()
    with connections.recorded():
        first, _ = pair(stack)
    second, _ = connections.opened_by(lambda: pair(stack))
    with connections.recorded():
        third, _ = pair(stack)
    connections.cut()
    assert (is_cut(first), is_cut(second), is_cut(third)) == (False, True, True)


def test_a_connection_is_not_cut_while_it_is_made(stack: ExitStack) -> None:
    connections = Connections()

    def connect() -> socket.socket:
        made, _ = pair(stack)
        connections.cut()
        assert not is_cut(made)
        return made

    made = connections.opened_by(connect)
    connections.cut()
    assert is_cut(made)


def test_listening_sockets_go_on_listening(stack: ExitStack) -> None:
    connections = Connections()
    with connections.recorded():
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    connections.cut()
    stack.enter_context(socket.create_connection(listener.getsockname(), timeout=5))
    stack.enter_context(listener.accept()[0])


def test_a_descriptor_that_is_another_socket_by_now_is_left_alone(stack: ExitStack) -> None:
    connections = Connections()
    with connections.recorded():
        old, _ = pair(stack)
    other, _ = pair(stack)
    descriptor = old.fileno()
    os.dup2(other.fileno(), descriptor)
    connections.cut()
    assert not is_cut(other)


def test_a_descriptor_that_is_a_file_by_now_is_left_alone(stack: ExitStack) -> None:
    connections = Connections()
    with connections.recorded():
        old, _ = pair(stack)
    with open(os.devnull, "rb") as file:
        os.dup2(file.fileno(), old.fileno())
    connections.cut()
    assert os.read(old.fileno(), 1) == b""


def test_cutting_twice_or_nothing_is_no_error(stack: ExitStack) -> None:
    connections = Connections()
    connections.cut()
    with connections.recorded():
        one, _ = pair(stack)
    connections.cut()
    connections.cut()
    assert is_cut(one)
