"""The folder that a worker on another host serves, as an fsspec file system: ``scar-neighbour://host:port/``."""

import errno
import io
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import fsspec
from typing_extensions import override

from lightning_scar.storage.folder_client import FolderClient
from lightning_scar.storage.folder_protocol import FileInfo

PROTOCOL = "scar-neighbour"
#: What is fetched at once where less is asked for, as headers and small tensors are. Anything larger is fetched as it
#: is asked for, right into its place.
_READAHEAD = 1 << 16


class NeighbourFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """The folder of a :class:`~.folder_server.FolderServer`, to be read by any number of threads.

    Args:
        host: Where the server listens.
        port: Its port.
        key: Its key.
        timeout: Seconds to wait for the server when it is its turn.

    Example::

        >>> import tempfile
        >>> from pathlib import Path
        >>> from lightning_scar.storage.directory import Directory
        >>> from lightning_scar.storage.folder_server import FolderServer
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.bin").write_bytes(b"1234")
        >>> server = FolderServer(folder, key=b"a secret")
        >>> neighbour = Directory("scar-neighbour://127.0.0.1:%d/" % server.address[1], {"key": b"a secret"})
        >>> neighbour.names(), neighbour.read("a.bin")
        (['a.bin'], b'1234')
        >>> server.close()

    """

    protocol = PROTOCOL
    root_marker = "/"
    # Another instance is no dearer than its connections, and one that is kept would keep them open.
    cachable = False

    def __init__(self, host: str, port: int, key: bytes, timeout: float = 30.0) -> None:
        super().__init__()
        self._connect = partial(FolderClient, host, port, key, timeout)
        self._idle: list[FolderClient] = []
        #: Why the server was lost, if so. It is not asked again then: each time might take as long.
        self.lost: ConnectionError | None = None
        weakref.finalize(self, _close, self._idle)

    @contextmanager
    def client(self) -> Iterator[FolderClient]:
        """A connection that no other thread uses meanwhile. As many are kept as were ever in use at the same time.

        Raises:
            ConnectionError: If the server cannot be reached, or was lost before.

        """
        if self.lost is not None:
            raise ConnectionError(str(self.lost))
        try:
            client = self._taken()
            try:
                yield client
            finally:
                if not client.is_closed:
                    self._idle.append(client)
        except ConnectionError as error:
            self.lost = error
            raise

    def _taken(self) -> FolderClient:
        try:
            return self._idle.pop()
        except IndexError:
            return self._connect()

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
        parts = urlsplit(path)
        if parts.scheme != PROTOCOL:
            return {}
        if not parts.hostname or parts.port is None:
            raise ValueError(f"{path!r} does not say where the server listens: pass {PROTOCOL}://host:port/")
        return {"host": parts.hostname, "port": parts.port}

    @classmethod
    @override
    def _strip_protocol(cls, path: str) -> str:
        _, found, rest = path.partition("://")
        return "/" + (rest.partition("/")[2] if found else path).strip("/")

    @override
    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """What lies in a folder now: dicts with ``name``, ``size`` and ``type``, or full names only.

        Raises:
            FileNotFoundError: If there is no such folder.

        """
        folder = self._strip_protocol(path)
        try:
            with self.client() as client:
                found = [self._details(f"{folder.rstrip('/')}/{info.name}", info) for info in client.list(folder[1:])]
        except NotADirectoryError:
            found = [self.info(path)]
        return found if detail else [info["name"] for info in found]

    @override
    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """What is known of a file or folder: ``name``, ``size`` in bytes and ``type``.

        Raises:
            FileNotFoundError: If there is none.

        """
        name = self._strip_protocol(path)
        with self.client() as client:
            return self._details(name, client.info(name[1:]))

    @staticmethod
    def _details(name: str, info: FileInfo) -> dict[str, Any]:
        return {"name": name, "size": info.size, "type": "directory" if info.is_folder else "file"}

    @override
    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """The bytes of a file from one offset to another, which count as in slices.

        Raises:
            FileNotFoundError: If there is no such file.

        """
        with self.client() as client:
            return client.read(self._strip_protocol(path)[1:], start or 0, end)

    @override
    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **_: Any) -> io.BufferedReader:
        if mode != "rb":
            raise OSError(errno.EROFS, "a neighbour's folder is read-only, put files by a FolderClient", path)
        return _Buffered(_NeighbourFile(self, path), block_size or _READAHEAD)


class _NeighbourFile(io.RawIOBase):
    """A file that is fetched exactly as it is asked for."""

    def __init__(self, files: NeighbourFileSystem, path: str) -> None:
        self._files = files
        self._name = path[1:]
        self._size: int = files.info(path)["size"]
        self._position = 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if position < 0:
            raise ValueError(f"cannot seek to {position}, before the file's beginning")
        self._position = position
        return position

    @override
    def readinto(self, into: Any, /) -> int:
        # The buffer asks for its whole size, and asks once more at the end.
        wanted = memoryview(into).cast("B")[: max(0, self._size - self._position)]
        if not wanted:
            return 0
        count = self.preadv([wanted], self._position)
        self._position += count
        return count

    def preadv(self, into: Sequence[memoryview], offset: int) -> int:
        with self._files.client() as client:
            return client.read_into(self._name, offset, *into)

    @override
    def readall(self) -> bytes:
        with self._files.client() as client:
            data = client.read(self._name, self._position)
        self._position += len(data)
        return data


class _Buffered(io.BufferedReader):
    """Adds to a buffered file what leaves the buffer aside."""

    def __init__(self, raw: _NeighbourFile, buffer_size: int) -> None:
        super().__init__(raw, buffer_size)
        self.preadv = raw.preadv


def _close(clients: list[FolderClient]) -> None:
    for client in clients:
        client.close()


fsspec.register_implementation(PROTOCOL, NeighbourFileSystem)
