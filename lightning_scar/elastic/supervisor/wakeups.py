"""What a supervisor waits for, in one place: signals, children that exit, and news in the logs."""

import selectors
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_scar.elastic.protocol.doorbell import LOOPBACK, Doorbell, hear, prepare, ring


class Wakeups:
    """The other ends of :class:`doorbells <lightning_scar.elastic.protocol.doorbell.Doorbell>`, and signals.

    The workers of a node ring at its supervisor, which rings at that of node 0, where the coordinator is. What that
    has decided takes the opposite way.

    Args:
        node_0: The port on this host that leads to that of node 0, from another node.

    Example::

        >>> wakeups = Wakeups()
        >>> doorbell = Doorbell(wakeups.port)
        >>> doorbell.ring()
        >>> wakeups.wait(60)
        >>> wakeups.ring()
        >>> doorbell.wait(60)
        True

    """

    def __init__(self, node_0: int | None = None) -> None:
        #: The other ends of doorbells, and who introduced themselves over them.
        self._connections: dict[socket.socket, str] = {}
        self._gone: list[str] = []
        self._selector = selectors.DefaultSelector()
        self._inside, self._outside = socket.socketpair()
        for end in (self._inside, self._outside):
            end.setblocking(False)
        self._listen_to(self._inside, lambda: hear(self._inside))
        self._listener = socket.create_server((LOOPBACK, 0))
        self._listener.setblocking(False)
        self._listen_to(self._listener, self._accept)
        self._node_0 = Doorbell(node_0) if node_0 is not None else None
        if self._node_0 is not None:
            self._listen_to(self._node_0, self._pass_down)

    @property
    def port(self) -> int:
        """Where it listens."""
        port: int = self._listener.getsockname()[1]
        return port

    def wait(self, seconds: float) -> None:
        """Wait for anything, at most so many seconds."""
        for key, _ in self._selector.select(seconds):
            key.data()

    @contextmanager
    def woken_by_signals(self) -> Iterator[None]:
        """Let signals that have a handler wake it, and children that exit; in the main thread."""
        before = signal.signal(signal.SIGCHLD, lambda *_: None)
        descriptor = signal.set_wakeup_fd(self._outside.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            signal.signal(signal.SIGCHLD, before)

    def ring(self) -> None:
        """Ring at all doorbells: the coordinator has decided something."""
        self._accept()
        for connection in self._connections:
            ring(connection)

    def report(self) -> None:
        """Wake the supervisor of node 0: there is an event."""
        if self._node_0 is not None:
            self._node_0.ring()
        else:
            ring(self._outside)

    def introduce(self, name: str) -> None:
        """Tell node 0 who this is."""
        if self._node_0 is not None:
            self._node_0.introduce(name)

    def gone(self) -> list[str]:
        """Return whose connections broke since the last call, of those that introduced themselves."""
        gone, self._gone = self._gone, []
        return gone

    def close(self) -> None:
        """Close all connections."""
        for connection in (*self._connections, self._listener, self._inside, self._outside):
            connection.close()
        if self._node_0 is not None:
            self._node_0.close()
        self._selector.close()

    def _listen_to(self, source: socket.socket | Doorbell, handle: Callable[[], object]) -> None:
        self._selector.register(source, selectors.EVENT_READ, handle)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            prepare(connection)
            self._connections[connection] = ""
            self._listen_to(connection, lambda connection=connection: self._hear(connection))  # type: ignore[misc]
            # There may have been news since it connected.
            ring(connection)

    def _hear(self, connection: socket.socket) -> None:
        said = hear(connection)
        if said is None:
            self._selector.unregister(connection)
            connection.close()
            self._gone += filter(None, [self._connections.pop(connection)])
        elif said:
            self._connections[connection] = said
        if self._node_0 is not None:
            self._node_0.ring()

    def _pass_down(self) -> None:
        assert self._node_0 is not None
        if not self._node_0.answer():
            # The store of node 0 tells why.
            self._selector.unregister(self._node_0)
        self.ring()
