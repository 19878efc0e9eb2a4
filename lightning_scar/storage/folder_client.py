"""The folder of another host's memory, as its callers see it."""

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import Any

from lightning_scar.storage.folder_protocol import Channel, FileInfo, NoRoomError


class FolderClient(AbstractContextManager["FolderClient"]):
    """One connection to a :class:`~.folder_server.FolderServer`, for one thread at a time.

    Whatever the server refuses is raised as the ``OSError`` that it met, and the connection stays usable. Every method
    raises ``ConnectionError`` when the server is gone or nothing moves for too long; the client is closed then.

    Args:
        host: Where the server listens.
        port: Its port.
        key: Its key.
        timeout: Seconds to wait for the server when it is its turn.

    Raises:
        ConnectionError: If no server can be reached there.
        PermissionError: If it has another key.

    Example::

        >>> import tempfile
        >>> from lightning_scar.storage.folder_server import FolderServer
        >>> here, there = (Path(tempfile.mkdtemp()) for _ in range(2))
        >>> _ = (here / "a.bin").write_bytes(b"1234")
        >>> server = FolderServer(there, key=b"a secret")
        >>> with FolderClient(*server.address, key=b"a secret") as client:
        ...     client.put("copies/b.bin", here / "a.bin")
        ...     client.list("copies")
        [FileInfo(name='b.bin', size=4, is_folder=False)]
        >>> server.close()

    """

    def __init__(self, host: str, port: int, key: bytes, timeout: float = 30.0) -> None:
        self._address = f"{host}:{port}"
        self._channel = connect(host, port, key, timeout)

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, by hand or by an error."""
        return self._channel.is_closed

    def list(self, folder: str = "") -> Sequence[FileInfo]:
        """What lies in a folder now.

        Raises:
            FileNotFoundError: If there is no such folder.

        """
        return [FileInfo(*found) for found in self._ask("list", folder)["found"]]

    def info(self, name: str) -> FileInfo:
        """What is known of a file or folder.

        Raises:
            FileNotFoundError: If there is none.

        """
        return FileInfo(*self._ask("info", name)["found"])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes of a file from one offset to another, or to its end: offsets count as in slices.

        Raises:
            FileNotFoundError: If there is no such file.

        """
        data = bytearray(self._ask("read", name, start=start, stop=stop)["size"])
        with self._conversation():
            self._channel.receive_into(memoryview(data))
        return bytes(data)

    def read_into(self, name: str, start: int, *into: memoryview) -> int:
        """Fills memories, one after the other, with the bytes of a file from an offset on.

        Returns:
            How many there were; fewer than asked for only where the file ends.

        Raises:
            FileNotFoundError: If there is no such file.

        """
        wanted = sum(map(len, into))
        count: int = self._ask("read", name, start=start, stop=start + wanted)["size"]
        with self._conversation():
            self._channel.receive_into(*_first(into, count))
        return count

    def put(self, name: str, path: Path) -> None:
        """Copies a file there; when this returns, readers there see all of it. Before, they see nothing of it.

        Args:
            name: The name that it gets. Folders are made as needed.
            path: The file here.

        Raises:
            NoRoomError: If the server takes no more.

        """
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            self._ask("put", name, size=size)
            with self._conversation():
                self._channel.send_file(file.fileno(), 0, size)
                answer = self._channel.receive()
        self._raise_refusal(name, answer)

    def delete(self, name: str) -> None:
        """Deletes a file; one that is already gone is no error."""
        self._ask("delete", name)

    def close(self) -> None:
        """Hangs up; a second time does nothing."""
        self._channel.close()

    def __exit__(self, *exception: object) -> None:
        """Hangs up."""
        self.close()

    def _ask(self, do: str, name: str, **details: Any) -> dict[str, Any]:
        with self._conversation():
            self._channel.send({"do": do, "name": name, **details})
            answer = self._channel.receive()
        self._raise_refusal(name, answer)
        return answer

    @contextmanager
    def _conversation(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            # What was under way may still arrive, and would be taken for the next answer.
            self.close()
            if isinstance(error, ConnectionError):
                raise ConnectionError(f"lost the folder server at {self._address}: {error}") from error
            raise

    def _raise_refusal(self, name: str, answer: dict[str, Any]) -> None:
        if "errno" in answer:
            kind = NoRoomError if answer["errno"] == errno.ENOSPC else OSError
            raise kind(answer["errno"], answer["reason"], f"{self._address}/{name}")


def _first(memories: Sequence[memoryview], count: int) -> Iterator[memoryview]:
    """The first so many bytes of memories."""
    for memory in memories:
        yield memory[:count]
        count = max(0, count - len(memory))


def connect(host: str, port: int, key: bytes, timeout: float) -> Channel:
    """A channel to a server, after both ends have proved that they know the key.

    Raises:
        ConnectionError: If no server can be reached there.
        PermissionError: If it has another key.

    """
    try:
        channel = Channel(socket.create_connection((host, port), timeout), timeout)
    except OSError as error:
        raise ConnectionError(f"no folder server can be reached at {host}:{port} ({error}): has it ended?") from error
    try:
        channel.introduce(key)
    except BaseException as error:
        channel.close()
        if isinstance(error, AuthenticationError):
            message = "the folder server there has another key: give both the key of one run"
            raise PermissionError(errno.EACCES, message, f"{host}:{port}") from error
        if isinstance(error, ConnectionError):
            raise ConnectionError(f"{host}:{port} is no folder server, or it has ended: {error}") from error
        raise
    return channel
