"""The memory of another host as a place of files: this end puts copies there, the other end receives them."""

import errno
import re
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing import AuthenticationError
from typing import Any

from lightning_scar.storage.channel import Channel
from lightning_scar.storage.delta import SUFFIX
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.store import is_rank_folder

#: Seconds that a caller may take to prove that it knows the key, or to continue in the middle of a file.
PATIENCE = 30.0
#: Seconds until the next try when the system has no descriptor or thread left for a caller.
_PAUSE = 0.1
#: Bytes of a file that are received before they are written.
PIECE = 1 << 21
#: Only deltas of ranks are accessible.
_NAME = re.compile(rf"[\w.-]+{re.escape(SUFFIX)}")


class NoRoomError(OSError):
    """The memory of another host is full."""


class Neighbour:
    """The memory of another host.

    Args:
        host: Where its :class:`Server` listens.
        port: The port.
        key: The key that both ends know.
        timeout: Seconds that the server may be silent.

    Raises:
        ConnectionError: From every method, if the server cannot be reached or is lost. The object is unusable then.
        OSError: From every method, if the server refuses.

    """

    def __init__(self, host: str, port: int, key: bytes, timeout: float = PATIENCE) -> None:
        try:
            self._channel = Channel(socket.create_connection((host, port), timeout), timeout)
        except OSError as error:
            raise ConnectionError(f"{host}:{port} cannot be reached: {error}") from error
        try:
            self._channel.introduce(key)
        except AuthenticationError as error:
            self.close()
            raise ConnectionError(f"{host}:{port} has another key: it serves another run") from error
        except ConnectionError:
            self.close()
            raise

    def names(self, folder: str) -> list[str]:
        """Return the names of the deltas in a rank's folder."""
        found: list[str] = self._ask(do="names", name=folder)["names"]
        return found

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Put a file there; it becomes visible when it is complete.

        Args:
            name: The folder of the rank, and the name of the file.
            pieces: Its bytes.

        """
        pieces = list(pieces)
        self._ask(do="put", name=name, size=sum(map(len, pieces)))
        for piece in pieces:
            self._channel.send_data(memoryview(piece))
        self._answer()

    def delete(self, name: str) -> None:
        """Delete a file there; one that is already gone is no error."""
        self._ask(do="delete", name=name)

    def _ask(self, **request: Any) -> dict[str, Any]:
        self._channel.send(request)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        answer = self._channel.receive()
        if "errno" in answer:
            kind = NoRoomError if answer["errno"] == errno.ENOSPC else OSError
            raise kind(answer["errno"], answer["reason"])
        return answer

    def cut(self) -> None:
        """Abort another thread's call."""
        with suppress(OSError):
            self._channel.cut()

    def close(self) -> None:
        """Hang up."""
        self._channel.close()


class Server:
    """Receives what ranks of other hosts put into this host's memory, in its own threads.

    Clients that know the key may list, put and delete deltas; both ends prove that they know it. Nothing is encrypted.

    Args:
        memory: The folder in memory.
        key: The key that clients must know.
        host: The interface to listen on.
        limit: Bytes that one rank may take; ``None`` for no limit.

    Attributes:
        address: Where it listens: the interface, and a port that was free.

    Raises:
        OSError: If there is no such interface.

    Example::

        >>> memory = Directory("memory://served-example")
        >>> server = Server(memory, key=b"a secret")
        >>> neighbour = Neighbour(*server.address, key=b"a secret")
        >>> neighbour.write("rank-0001/delta-1.safetensors", [b"1234"])
        >>> neighbour.names("rank-0001"), memory.read("rank-0001/delta-1.safetensors")
        (['delta-1.safetensors'], b'1234')
        >>> neighbour.close(), server.close()
        (None, None)

    """

    def __init__(self, memory: Directory, key: bytes, host: str = "127.0.0.1", limit: int | None = None) -> None:
        self._memory = memory
        self._key = key
        self._limit = limit
        self._requests = {"names": self._names, "put": self._put, "delete": self._delete}
        self._listener = socket.create_server((host, 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._lock = threading.Lock()
        self._callers: dict[Channel, threading.Thread] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="scar-server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close all connections, even in the middle of a file, and end the threads. Received files stay."""
        with self._lock:
            self._closing.set()
            threads = [self._thread, *self._callers.values()]
            for channel in self._callers:
                with suppress(OSError):
                    channel.cut()
            # Closing it would not wake the thread that waits for it.
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            with suppress(OSError, RuntimeError):
                channel = Channel(self._listener.accept()[0], PATIENCE)
                thread = threading.Thread(target=self._serve, args=(channel,), name="scar-server", daemon=True)
                with self._lock:
                    self._callers[channel] = thread
                    thread.start()
                continue
            # No descriptor or thread is left for a caller.
            self._closing.wait(_PAUSE)

    def _serve(self, channel: Channel) -> None:
        # The client has hung up, or has another key.
        with suppress(ConnectionError, AuthenticationError):
            channel.admit(self._key)
            while not self._closing.is_set():
                self._answer(channel, channel.receive(patient=True))
        with self._lock:
            self._callers.pop(channel, None)
            channel.close()

    def _answer(self, channel: Channel, request: dict[str, Any]) -> None:
        try:
            answer = self._requests[request["do"]](channel, request)
        except ConnectionError:
            raise
        except OSError as error:
            answer = {"errno": error.errno or errno.EIO, "reason": error.strerror or str(error)}
        except (KeyError, TypeError, ValueError) as error:
            reason = f"invalid request ({error!r}): do all workers run the same version?"
            answer = {"errno": errno.EINVAL, "reason": reason}
        channel.send(answer)

    def _names(self, channel: Channel, request: dict[str, Any]) -> dict[str, Any]:
        return {"names": [name for name in self._memory.names(_folder(request)) if name.endswith(SUFFIX)]}

    def _put(self, channel: Channel, request: dict[str, Any]) -> dict[str, Any]:
        name, size = _file(request), int(request["size"])
        self._check_room(name, size)
        # The client waits for this answer, so that refused data is not sent.
        channel.send({})
        pieces = _received(channel, size)
        try:
            self._memory.write(name, pieces)
        finally:
            # If it was not written the rest is still on its way, and the next message behind it.
            for _ in pieces:
                pass
        return {}

    def _delete(self, channel: Channel, request: dict[str, Any]) -> dict[str, Any]:
        self._memory.delete(_file(request))
        return {}

    def _check_room(self, name: str, size: int) -> None:
        if self._limit is None:
            return
        taken = self._memory.bytes_in(name.partition("/")[0])
        if taken + size > self._limit:
            reason = f"no room for {size} bytes, this rank has taken {taken} of {self._limit} there: raise memory_limit"
            raise OSError(errno.ENOSPC, reason)


def _received(channel: Channel, size: int) -> Iterator[memoryview]:
    while size > 0:
        piece = memoryview(bytearray(min(size, PIECE)))
        channel.receive_data(piece)
        size -= len(piece)
        yield piece


def _folder(request: dict[str, Any]) -> str:
    folder = str(request["name"])
    if not is_rank_folder(folder):
        raise PermissionError(errno.EACCES, "only rank folders are accessible")
    return folder


def _file(request: dict[str, Any]) -> str:
    folder, _, name = str(request["name"]).partition("/")
    if not is_rank_folder(folder) or not _NAME.fullmatch(name):
        raise PermissionError(errno.EACCES, "only deltas of ranks are accessible")
    return f"{folder}/{name}"
