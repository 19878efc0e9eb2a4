"""The sockets of a process group, which can be shut down to wake a worker that is blocked in a collective.

``abort`` does nothing for gloo: a rank whose own neighbours are alive waits for the group's timeout after another one
died. A socket that is shut down fails at once at both ends, whatever holds references to the group.
"""

import json
import os
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from typing_extensions import override

from lightning_scar.elastic.worker.errors import GroupLostError

_DESCRIPTORS = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"

#: The addresses of a connection's two ends: here and there.
_Ends: TypeAlias = tuple[Any, Any]

T = TypeVar("T")


class _GroupStore(Store):
    """Passes on what a group asks of its store, and keeps what members publish there: the addresses of gloo.

    Args:
        store: The store.

    """

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store
        self._published: dict[str, bytes] = {}

    @property
    def published(self) -> bytes:
        """All that was published."""
        return b"".join(list(self._published.values()))

    def forget(self) -> None:
        """Forget it."""
        self._published = {}

    @override
    def set(self, key: str, value: Any) -> None:
        self._published[key] = value if isinstance(value, bytes) else value.encode()
        self._store.set(key, value)

    @override
    def get(self, key: str) -> bytes:
        self.wait([key])
        self._published[key] = value = self._store.get(key)
        return value

    @override
    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        # A group sets its timeout here, not in what is behind this store.
        self._store.wait(keys, self.timeout if timeout is None else timeout)  # type: ignore[attr-defined]

    @override
    def add(self, key: str, number: int) -> int:
        return int(self._store.add(key, number))

    @override
    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        value: bytes = self._store.compare_set(key, expected, desired)
        return value

    @override
    def check(self, keys: list[str]) -> bool:
        return bool(self._store.check(keys))

    @override
    def delete_key(self, key: str) -> bool:
        return bool(self._store.delete_key(key))

    @override
    def num_keys(self) -> int:
        return int(self._store.num_keys())

    #: What torch calls them from C++.
    deleteKey, getNumKeys = delete_key, num_keys


class Connections:
    """The sockets of a process group, and that of the store which it forms over; no others.

    Threads may open sockets of their own while a group forms. Those of the group are known by their addresses: each
    one connects two members that have published where they listen.

    Example::

        >>> server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        >>> connections = Connections()
        >>> with connections.forming(lambda: TCPStore("127.0.0.1", server.port, wait_for_workers=False)) as store:
        ...     store.set("here", "I am")
        >>> connections.cut()

    """

    def __init__(self) -> None:
        self._store: _GroupStore | None = None
        self._store_ends: set[_Ends] = set()
        self._is_forming = False
        self._lock = threading.Lock()

    @contextmanager
    def forming(self, connect: Callable[[], Store], is_aborted: bool = False) -> Iterator[Store]:
        """Connect to a store, and yield it for a group to form over in the ``with`` block.

        The group before is forgotten. The connection is not cut before it is made, since it would be tried again.

        Args:
            connect: Makes it. The connection of a store that is no ``TCPStore`` stays.
            is_aborted: Whether the group's own connections need not be known, since it is aborted. Threads of NCCL ask
                the store at any time, when no Python may run.

        """
        before = {ends for _, ends in _connections()}
        store = connect()
        port = store.port if isinstance(store, TCPStore) else None
        new = {ends for _, ends in _connections() if ends[1][1] == port} - before
        with self._lock:
            self._store, self._store_ends, self._is_forming = _GroupStore(store), new, True
        try:
            yield store if is_aborted else self._store
        finally:
            with self._lock:
                self._is_forming = False

    def check(self, store: Store, rank: int, size: int) -> None:
        """Check that this rank's group has no connection but to members. All of them call it, when it has formed.

        gloo takes whoever connects first and knows a number that can be guessed. So members tell each other between
        which addresses their connections are. Each connection has to be known at both ends; rank 0 looks at them all.

        Args:
            store: That of the group.
            rank: This rank.
            size: How many members there are.

        Raises:
            GroupLostError: If somebody else is in it.

        """
        assert self._store is not None
        published = self._store.published
        found = [
            [_text(end) for end in ends]
            for connection, ends in _connections()
            if any(_packed(connection, end) in published for end in ends)
        ]
        store.set(f"connections/{rank}", json.dumps(found))
        if rank == 0:
            told = [json.loads(store.get(f"connections/{other}")) for other in range(size)]
            ends = {(here, there) for connections in told for here, there in connections}
            store.set("strangers", ", ".join(there for here, there in ends if (there, here) not in ends))
        if strangers := store.get("strangers").decode():
            raise GroupLostError(f"{strangers} got into the process group and is no member")

    def cut(self) -> None:
        """Shut them down, from any thread. While the group forms also those that are opened later."""
        store = self._store
        if self._cut_once(store):
            threading.Thread(
                target=self._cut_until_formed, args=[store], name="lightning-scar cut", daemon=True
            ).start()

    def _cut_until_formed(self, store: _GroupStore | None) -> None:
        while self._cut_once(store):
            time.sleep(0.02)

    def _cut_once(self, store: _GroupStore | None) -> bool:
        """Return whether more may come to the group that forms over a store."""
        with self._lock:
            if store is None or store is not self._store:
                return False
            for connection, ends in _connections():
                if ends in self._store_ends or any(_packed(connection, end) in store.published for end in ends):
                    with suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
            if not self._is_forming:
                # Somebody else may get them.
                store.forget()
                self._store_ends = set()
            return self._is_forming


def _connections() -> Iterator[tuple[socket.socket, _Ends]]:
    """Yield a duplicate of each TCP connection of this process, whose descriptor is not used again meanwhile.

    A listening socket has no peer, and is left out. To shut one down would make gloo end the process.
    """
    for name in os.listdir(_DESCRIPTORS):
        # It may have been closed by now.
        with suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            descriptor = os.dup(int(name))
            try:
                connection = socket.socket(fileno=descriptor)
            except OSError:
                os.close(descriptor)
                continue
            with connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    yield connection, (connection.getsockname(), connection.getpeername())


def _text(end: Any) -> str:
    return f"{end[0].partition('%')[0]}:{end[1]}"


def _packed(connection: socket.socket, end: Any) -> bytes:
    """Return the address of one end as it stands in the system's structures, which gloo publishes."""
    host, port, *more = end
    if connection.family == socket.AF_INET:
        return struct.pack("!H4s", port, socket.inet_pton(socket.AF_INET, host))
    return struct.pack("!HI16s", port, more[0], socket.inet_pton(socket.AF_INET6, host.partition("%")[0]))
