"""Tells a process that there is news, in the place of asking the store again and again.

Nothing else goes over it: what the news is stands in the :mod:`logs <lightning_scar.elastic.protocol.log>`. So a ring
in vain does no harm, and whoever is killed between its entry and its ring is heard all the same: the end of its
connection is a ring, too.
"""

import selectors
import socket
from contextlib import suppress

LOOPBACK = "127.0.0.1"
_RING = b"\n"
_ENOUGH = 4096
#: Seconds to connect.
_PATIENCE = 30


class Doorbell:
    """A connection to the supervisor of this node, or from there to that of node 0. Both ends can ring.

    Args:
        port: Where the other end listens on this host, or what leads there; see
            :class:`~lightning_scar.elastic.supervisor.wakeups.Wakeups`.

    Raises:
        OSError: If nobody listens there.

    """

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection((LOOPBACK, port), timeout=_PATIENCE)
        prepare(self._socket)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)

    def fileno(self) -> int:
        """Return its descriptor, for a selector."""
        return self._socket.fileno()

    def introduce(self, name: str) -> None:
        """Say whose connection it is, to whom that may concern when it breaks."""
        ring(self._socket, name.encode() + _RING)

    def ring(self) -> None:
        """Ring at the other end."""
        ring(self._socket)

    def answer(self) -> bool:
        """Forget the rings so far. Return whether the other end is there."""
        return hear(self._socket) is not None

    def wait(self, seconds: float) -> bool:
        """Wait for a ring. Return whether the other end is there.

        Args:
            seconds: How long at most.

        """
        return self.answer() if self._selector.select(max(0.0, seconds)) else True

    def close(self) -> None:
        """Close it, from any thread; one that waits wakes up."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


def prepare(connection: socket.socket) -> None:
    """Let a connection carry single bytes at once, and block nobody."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setblocking(False)


def ring(connection: socket.socket, data: bytes = _RING) -> None:
    """Send a ring. Where the other end is gone, or has not heard so many before, that is enough."""
    with suppress(OSError):
        connection.send(data)


def hear(connection: socket.socket) -> str | None:
    """Return what was said beside rings; ``None`` if the other end is gone."""
    try:
        data = connection.recv(_ENOUGH)
    except BlockingIOError:
        return ""
    except OSError:
        return None
    return data.replace(_RING, b"").decode(errors="replace") if data else None
