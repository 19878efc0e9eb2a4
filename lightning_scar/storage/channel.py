"""How two hosts talk about files: JSON messages, and the bytes of files between them, on one connection.

A request is a message ``{"do": ..., "name": ...}``. The answer has ``errno`` in it if the request is refused. Nothing
that arrives is unpickled.
"""

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import orjson

#: A list of a hundred thousand files is shorter.
_LONGEST_MESSAGE = 1 << 24


@contextmanager
def _as_connection_errors() -> Iterator[None]:
    """Turn all the ways in which a conversation ends into ``ConnectionError``."""
    try:
        yield
    except ConnectionError:
        raise
    except EOFError:
        raise ConnectionError("the connection was closed") from None
    except (BlockingIOError, TimeoutError):
        raise ConnectionError("the connection timed out") from None
    except (OSError, ValueError, AssertionError) as error:
        # Older Pythons answer a peer that speaks another protocol with an assertion.
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


class Channel:
    """One end of a connection.

    Args:
        peer: The connected socket, which belongs to the channel from here on.
        timeout: Seconds that the other end may be silent when it is its turn.

    Raises:
        ConnectionError: From every method, if the other end is gone or does not keep to the protocol.

    Example::

        >>> one, other = (Channel(end, timeout=5) for end in socket.socketpair())
        >>> one.send({"do": "list"})
        >>> other.receive()
        {'do': 'list'}

    """

    def __init__(self, peer: socket.socket, timeout: float) -> None:
        self._timeout = timeout
        # Python's own timeout would make the descriptor non-blocking, which a Connection does not expect.
        peer.setblocking(True)
        limit = struct.pack("@ll", int(timeout), int(timeout % 1 * 1_000_000))
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if peer.family != socket.AF_UNIX:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = Connection(peer.detach())

    @_as_connection_errors()
    def admit(self, key: bytes) -> None:
        """Let the caller prove that it knows the key, then prove it to the caller.

        Raises:
            multiprocessing.AuthenticationError: If the keys differ.

        """
        deliver_challenge(self._connection, key)
        answer_challenge(self._connection, key)

    @_as_connection_errors()
    def introduce(self, key: bytes) -> None:
        """Do the caller's part of :meth:`admit`."""
        answer_challenge(self._connection, key)
        deliver_challenge(self._connection, key)

    @_as_connection_errors()
    def send(self, message: dict[str, Any]) -> None:
        """Send a message."""
        self._connection.send_bytes(orjson.dumps(message))

    @_as_connection_errors()
    def receive(self, patient: bool = False) -> dict[str, Any]:
        """Wait for a message.

        Args:
            patient: Whether to wait for its beginning as long as it takes.

        """
        if not self._connection.poll(None if patient else self._timeout):
            raise TimeoutError
        message = orjson.loads(self._connection.recv_bytes(_LONGEST_MESSAGE))
        if not isinstance(message, dict):
            raise ValueError(f"{message!r} is not a message")
        return message

    @_as_connection_errors()
    def send_data(self, data: memoryview) -> None:
        """Send bytes of a file, without a message around them."""
        while data:
            data = data[os.write(self._connection.fileno(), data) :]

    @_as_connection_errors()
    def receive_data(self, into: memoryview) -> None:
        """Fill a buffer with bytes of a file."""
        while into:
            # As os.read, but straight into its place.
            count = os.readv(self._connection.fileno(), [into])
            if not count:
                raise EOFError
            into = into[count:]

    def cut(self) -> None:
        """End the connection from another thread: both ends get an error if they are waiting."""
        with socket.socket(fileno=self._connection.fileno()) as peer:
            try:
                peer.shutdown(socket.SHUT_RDWR)
            finally:
                peer.detach()

    def close(self) -> None:
        """Close this end; a second time does nothing."""
        self._connection.close()
