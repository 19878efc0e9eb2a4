"""A folder of this host's memory for workers on other hosts: they read it, and put copies into it."""

import errno
import os
import socket
import threading
from contextlib import suppress
from multiprocessing import AuthenticationError
from pathlib import Path
from typing import Any

from lightning_scar.storage.folder_protocol import Channel
from lightning_scar.storage.served_folder import ServedFolder

#: Seconds that a caller may take to prove that it knows the key, or to go on in the middle of a file.
PATIENCE = 30.0
#: Seconds until the next try when the system has no descriptor or thread left for a caller.
_PAUSE = 0.1


class FolderServer:
    """Serves one folder, in threads of its own. Callers are :class:`~.folder_client.FolderClient`.

    Who knows the key may read, put and delete; both ends prove that they know it. Nothing is encrypted.

    Args:
        path: The folder. It has no other server.
        key: What callers have to know.
        host: The interface to listen on; others than this host reach the default one not.
        limit: How many bytes may lie in the folders of one name, which are those of one rank; ``None`` for any number.
            What a caller deletes gives its room back.

    Attributes:
        address: Where it listens: the interface, and a port that was free.

    Raises:
        ValueError: If the key is empty.
        OSError: If there is no such interface.

    Example::

        >>> import tempfile
        >>> from lightning_scar.storage.folder_client import FolderClient
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.bin").write_bytes(b"1234")
        >>> server = FolderServer(folder, key=b"a secret")
        >>> with FolderClient(*server.address, key=b"a secret") as client:
        ...     client.read("a.bin", 1, 3)
        b'23'
        >>> server.close()

    """

    def __init__(self, path: Path, key: bytes, host: str = "127.0.0.1", limit: int | None = None) -> None:
        if not key:
            raise ValueError("an empty key lets everybody in: pass random bytes, e.g. secrets.token_bytes()")
        self._key = key
        self._folder = ServedFolder(path, limit)
        self._requests = {
            "list": self._list,
            "info": self._info,
            "read": self._read,
            "put": self._put,
            "delete": self._delete,
        }
        self._listener = socket.create_server((host, 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._lock = threading.Lock()
        self._callers: dict[Channel, threading.Thread] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="scar-folder", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hangs up on all callers, also in the middle of a file, and ends the threads. The folder stays as it is."""
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
        self._folder.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            with suppress(OSError, RuntimeError):
                peer, _ = self._listener.accept()
                self._start(Channel(peer, PATIENCE))
                continue
            # The caller has hung up already, or no descriptor or thread was left: later ones are served again.
            self._closing.wait(_PAUSE)

    def _start(self, channel: Channel) -> None:
        thread = threading.Thread(target=self._serve, args=(channel,), name="scar-folder-caller", daemon=True)
        with self._lock:
            if self._closing.is_set():
                channel.close()
                return
            thread.start()
            self._callers[channel] = thread

    def _serve(self, channel: Channel) -> None:
        # In the caller's own thread from the first byte on: one who says nothing keeps nobody waiting.
        try:
            channel.admit(self._key)
            while True:
                self._answer(channel, channel.receive(patient=True))
        except (ConnectionError, AuthenticationError):
            # Gone, or never one of ours.
            pass
        finally:
            with self._lock:
                self._callers.pop(channel, None)
            channel.close()

    def _answer(self, channel: Channel, request: dict[str, Any]) -> None:
        try:
            self._requests[request["do"]](channel, request)
        except ConnectionError:
            raise
        except OSError as error:
            channel.send({"errno": error.errno or errno.EIO, "reason": error.strerror or str(error)})
        except (KeyError, TypeError, ValueError) as error:
            reason = f"the request is not understood ({error!r}): do all workers run the same version?"
            channel.send({"errno": errno.EINVAL, "reason": reason})

    def _list(self, channel: Channel, request: dict[str, Any]) -> None:
        channel.send({"found": [tuple(found) for found in self._folder.list(request["name"])]})

    def _info(self, channel: Channel, request: dict[str, Any]) -> None:
        channel.send({"found": tuple(self._folder.info(request["name"]))})

    def _read(self, channel: Channel, request: dict[str, Any]) -> None:
        with self._folder.open(request["name"]) as file:
            size = os.fstat(file.fileno()).st_size
            start, stop, _ = slice(request["start"], request["stop"]).indices(size)
            channel.send({"size": max(0, stop - start)})
            channel.send_file(file.fileno(), start, stop)

    def _put(self, channel: Channel, request: dict[str, Any]) -> None:
        with self._folder.place(request["name"], request["size"]) as descriptor:
            # The caller waits for this: what is refused is not even sent.
            channel.send({})
            channel.receive_file(descriptor, request["size"])
        channel.send({})

    def _delete(self, channel: Channel, request: dict[str, Any]) -> None:
        self._folder.delete(request["name"])
        channel.send({})
