"""A connection that an agent keeps open to node 0 as long as it lives, so that the death of either is noticed at once.

Nothing goes over it but who is at its end. The kernel closes it when a supervisor is killed, and gives it up when the
whole node no longer answers: long before the node's silence would tell. Who asks a store that no longer answers would
not even notice in the end.
"""

import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

#: Seconds without an answer of the other kernel until it is asked, between two questions, and how many of these.
_IDLE, _INTERVAL, _QUESTIONS = 5, 2, 5
#: Seconds to connect.
_CONNECT = 5.0
_LONGEST_NAME = 64


class Line:
    """An agent's end.

    Args:
        host: The address of node 0.
        port: Where its :class:`Lines` listen.
        name: Who this is.
        on_end: Called in a thread of its own when the line ends.

    Raises:
        OSError: If it cannot be reached.

    """

    def __init__(self, host: str, port: int, name: str, on_end: Callable[[], None]) -> None:
        self._socket = socket.create_connection((host, port), _CONNECT)
        self._socket.sendall(f"{name}\n".encode())
        self._socket.settimeout(None)
        _watch(self._socket)
        self._on_end = on_end
        self._thread = threading.Thread(target=self._listen, name="lightning-scar line", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hangs up."""
        with suppress(OSError):
            # Wakes the thread, as closing it would not.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        with suppress(OSError):
            self._socket.recv(1)
        self._on_end()


class Lines:
    """The ends on node 0.

    Attributes:
        port: Where they listen.

    Example::

        >>> lines = Lines()
        >>> line = Line("127.0.0.1", lines.port, "agent 1", on_end=lambda: None)
        >>> lines.ended()
        []
        >>> line.close()
        >>> while not (ended := lines.ended()):
        ...     pass
        >>> ended
        ['agent 1']
        >>> lines.close()

    """

    def __init__(self) -> None:
        is_dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if is_dual else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=is_dual)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._names: dict[socket.socket, str] = {}

    def ended(self) -> list[str]:
        """Whose line has ended since the last call."""
        with suppress(OSError):
            while True:
                self._accept()
        ready = [key.fileobj for key, _ in self._selector.select(timeout=0)]
        ended = [line for line in list(self._names) if line in ready and not self._hear(line)]
        for line in ended:
            self._selector.unregister(line)
            line.close()
        names = [self._names.pop(line) for line in ended]
        # Whoever said no name is none of ours.
        return [name.removesuffix("\n") for name in names if name.endswith("\n")]

    def close(self) -> None:
        """Hangs up."""
        for line in [self._listener, *self._names]:
            line.close()
        self._selector.close()

    def _accept(self) -> None:
        line, _ = self._listener.accept()
        line.setblocking(False)
        _watch(line)
        self._names[line] = ""
        self._selector.register(line, selectors.EVENT_READ)

    def _hear(self, line: socket.socket) -> bool:
        """Whether the line is still open."""
        try:
            said = line.recv(_LONGEST_NAME)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._names[line] += said.decode(errors="replace")
        return bool(said) and len(self._names[line]) <= _LONGEST_NAME


def _watch(line: socket.socket) -> None:
    """Has the kernel give the line up soon when the other one says nothing any more."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("KEEPIDLE", _IDLE), ("KEEPINTVL", _INTERVAL), ("KEEPCNT", _QUESTIONS)):
        # Not every system has them; its silence tells in the end.
        if hasattr(socket, f"TCP_{option}"):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{option}"), value)
