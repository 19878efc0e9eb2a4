"""The sockets of a process group, which can be shut down to wake a worker that is blocked in a collective.

``abort`` does nothing for gloo: a rank whose own neighbours are alive waits for the group's timeout after another one
died. A socket that is shut down fails at once at both ends, whatever holds references to the group.
"""

import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

_DESCRIPTORS = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"

#: A descriptor and its inode: descriptors are used again, inodes of sockets are not.
_Socket = tuple[int, int]

T = TypeVar("T")


class Connections:
    """The sockets that are opened while a process group forms.

    Example::

        >>> import socket
        >>> connections = Connections()
        >>> with connections.recorded():
        ...     one, other = socket.socketpair()
        >>> connections.cut()
        >>> other.recv(1)
        b''

    """

    def __init__(self) -> None:
        self._before: set[_Socket] = set()
        self._opened: set[_Socket] = set()
        self._is_recording = False
        self._lock = threading.Lock()

    def opened_by(self, connect: Callable[[], T]) -> T:
        """Record the sockets that a function opens, and forget those before: another group begins.

        They are not cut before it returns, since it would try again.
        """
        before = set(_sockets())
        result = connect()
        with self._lock:
            self._opened = set(_sockets()) - before
        return result

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the sockets that this process opens in the ``with`` block."""
        with self._lock:
            self._before, self._is_recording = set(_sockets()), True
        try:
            yield
        finally:
            with self._lock:
                self._record()
                self._is_recording = False

    def cut(self) -> None:
        """Shut them down, from any thread. During a recording also those that are opened later in it."""
        if self._cut_once():
            threading.Thread(target=self._cut_until_recorded, name="lightning-scar cut", daemon=True).start()

    def _cut_until_recorded(self) -> None:
        while self._cut_once():
            time.sleep(0.02)

    def _cut_once(self) -> bool:
        """Return whether more may come."""
        with self._lock:
            if self._is_recording:
                self._record()
            for descriptor, number in self._opened:
                _shut_down(descriptor, number)
            self._opened = set()
            return self._is_recording

    def _record(self) -> None:
        self._opened |= set(_sockets()) - self._before


def _sockets() -> Iterator[_Socket]:
    for name in os.listdir(_DESCRIPTORS):
        with suppress(OSError):
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                yield int(name), status.st_ino


def _shut_down(descriptor: int, number: int) -> None:
    with suppress(OSError):
        duplicate = os.dup(descriptor)
        if os.fstat(duplicate).st_ino != number:
            os.close(duplicate)
            return
        with socket.socket(fileno=duplicate) as connection:
            # A listening socket has no peer. To shut one down would make gloo end the process.
            if connection.getpeername() is not None:
                connection.shutdown(socket.SHUT_RDWR)
