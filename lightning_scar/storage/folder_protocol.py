"""How a served folder and its callers talk: JSON messages, and the bytes of files between them, on one connection.

A request is a message ``{"do": ..., "name": ...}``, and so is its answer, with ``errno`` in it if it is a refusal.
Nothing that arrives is ever unpickled.
"""

import os
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any, NamedTuple

import orjson

#: The list of a folder with a hundred thousand files is shorter.
_LONGEST_MESSAGE = 1 << 24
#: What is received of a file before it is written. Each piece has to win the interpreter back from a training's own
#: thread, so small ones are slow there; larger ones do not stay in the processor's cache.
_PIECE = 1 << 21


class NoRoomError(OSError):
    """A served folder takes no more: a put would exceed its limit, or what it lies on is full."""


class FileInfo(NamedTuple):
    """One file or folder.

    Attributes:
        name: Its name; in a list, without the folder that was listed.
        size: Bytes; 0 for a folder.
        is_folder: Whether it is one.

    """

    name: str
    size: int
    is_folder: bool


def beyond(memories: Iterable[memoryview], count: int) -> Iterator[memoryview]:
    """What of memories lies behind their first so many bytes.

    Example::

        >>> [bytes(memory) for memory in beyond([memoryview(b"12"), memoryview(b"345")], 3)]
        [b'45']

    """
    for memory in memories:
        if len(memory) > count:
            yield memory[count:]
        count = max(0, count - len(memory))


@contextmanager
def _as_connection_errors() -> Iterator[None]:
    """Turns all the ways in which a conversation ends into ``ConnectionError``."""
    try:
        yield
    except ConnectionError:
        raise
    except EOFError:
        raise ConnectionError("the connection was closed") from None
    except (BlockingIOError, TimeoutError):
        raise ConnectionError("nothing has moved for too long") from None
    except (OSError, ValueError, AssertionError) as error:
        # An assertion is how ``answer_challenge`` of older Pythons meets a peer of another kind.
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


class Channel(AbstractContextManager["Channel"]):
    """One end of a connection.

    Args:
        peer: The connected socket, which belongs to the channel from here on.
        timeout: Seconds in which something has to move when it is the other end's turn.

    Example::

        >>> one, other = (Channel(end, timeout=5) for end in socket.socketpair())
        >>> one.send({"do": "list"})
        >>> other.receive()
        {'do': 'list'}

    """

    def __init__(self, peer: socket.socket, timeout: float) -> None:
        self._socket = peer
        self._timeout = timeout
        # Without Python's own timeout, which makes the descriptor that is shared with the connection non-blocking.
        peer.setblocking(True)
        # Half, for a system call that has moved some bytes ends without an error: only the next one fails.
        limit = struct.pack("@ll", int(timeout / 2), int(timeout / 2 % 1 * 1_000_000))
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if peer.family != socket.AF_UNIX:
            # A message is one small packet, and no reason to wait for more.
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = Connection(os.dup(peer.fileno()))

    @_as_connection_errors()
    def admit(self, key: bytes) -> None:
        """Lets the caller prove that it knows the key, and then proves it to the caller.

        Raises:
            multiprocessing.AuthenticationError: If the keys differ.
            ConnectionError: If the caller does not keep to the protocol, or is gone.

        """
        deliver_challenge(self._connection, key)
        answer_challenge(self._connection, key)

    @_as_connection_errors()
    def introduce(self, key: bytes) -> None:
        """The caller's part of :meth:`admit`.

        Raises:
            multiprocessing.AuthenticationError: If the keys differ.
            ConnectionError: If the other end does not keep to the protocol, or is gone.

        """
        answer_challenge(self._connection, key)
        deliver_challenge(self._connection, key)

    @_as_connection_errors()
    def send(self, message: dict[str, Any]) -> None:
        """Sends a message.

        Raises:
            ConnectionError: If the other end is gone.

        """
        self._connection.send_bytes(orjson.dumps(message))

    @_as_connection_errors()
    def receive(self, patient: bool = False) -> dict[str, Any]:
        """Waits for a message.

        Args:
            patient: Whether to wait for its beginning as long as it takes.

        Raises:
            ConnectionError: If the other end is gone.

        """
        if not self._connection.poll(None if patient else self._timeout):
            raise TimeoutError
        message = orjson.loads(self._connection.recv_bytes(_LONGEST_MESSAGE))
        if not isinstance(message, dict):
            raise ValueError(f"{message!r} is no message")
        return message

    @_as_connection_errors()
    def send_file(self, descriptor: int, start: int, stop: int) -> None:
        """Sends the bytes of a file from one offset to another.

        Raises:
            ConnectionError: If the other end is gone, or the file ends earlier.

        """
        while start < stop:
            count = os.sendfile(self._socket.fileno(), descriptor, start, stop - start)
            if not count:
                raise ValueError(f"the file ends {stop - start} bytes too early")
            start += count

    @_as_connection_errors()
    def receive_into(self, *memories: memoryview) -> None:
        """Fills memories, one after the other, with what arrives.

        Raises:
            ConnectionError: If the other end is gone.

        """
        left = [memory for memory in memories if memory]
        while left:
            count = self._socket.recvmsg_into(left, 0, socket.MSG_WAITALL)[0]
            if not count:
                raise EOFError
            left = list(beyond(left, count))

    def receive_file(self, descriptor: int, size: int) -> None:
        """Writes what arrives to a file, from its position on.

        Raises:
            ConnectionError: If the other end is gone.
            OSError: If the file takes no more. Its bytes are received to the end nevertheless: messages come behind.

        """
        buffer = memoryview(bytearray(min(size, _PIECE)))
        trouble: OSError | None = None
        while size:
            piece = buffer[:size]
            self.receive_into(piece)
            size -= len(piece)
            try:
                while piece and trouble is None:
                    piece = piece[os.write(descriptor, piece) :]
            except OSError as error:
                trouble = error
        if trouble is not None:
            raise trouble

    def cut(self) -> None:
        """Ends the conversation from another thread: at both ends, whoever waits for something gets an error."""
        self._socket.shutdown(socket.SHUT_RDWR)

    @property
    def is_closed(self) -> bool:
        """Whether this end was closed."""
        return self._connection.closed

    def close(self) -> None:
        """Closes this end; a second time does nothing."""
        self._connection.close()
        self._socket.close()

    def __exit__(self, *exception: object) -> None:
        """Closes this end."""
        self.close()
