"""Other processes for :mod:`benchmarks.tiers`: a server of a folder, a sink of bytes, and copies to them."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lightning_scar.elastic.supervisor.folder import MemoryFolder
from lightning_scar.storage.chain import Address, Addresses, Chain
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.host_memory import VARIABLE
from lightning_scar.storage.neighbour import Server
from lightning_scar.storage.store import names_in, rank_folder

KEY = b"a benchmark's"
#: Bytes of the buffers that are copied over a plain socket: more than fits into caches.
_PIECE = 1 << 28
#: Seconds after which another process counts as lost.
PATIENCE = 300.0


@contextmanager
def memory_folder(parent: Path) -> Iterator[Path]:
    """Make a temporary folder the host's memory for running checkpoints.

    Folders of killed benchmarks are removed first.
    """
    before = os.environ.get(VARIABLE)
    with closing(MemoryFolder(parent)) as folder:
        os.environ[VARIABLE] = str(folder.path)
        try:
            yield folder.path
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before


@contextmanager
def other_process(body: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """Run a function in another process, which ends with the block.

    Args:
        body: Gets the arguments and a connection. It sends one object when it is ready, and returns when the connection
            is closed.
        arguments: The arguments.

    Yields:
        The object.

    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(body, arguments, there), daemon=True)
    try:
        process.start()
        there.close()
        if not here.poll(PATIENCE):
            raise TimeoutError(f"{body.__name__} is not ready after {PATIENCE:.0f} s")
        yield here.recv()
    finally:
        here.close()
        if process.pid is not None:
            process.join(5)
            process.kill()
            process.join()


def _run(body: Callable[..., None], arguments: tuple[Any, ...], connection: Connection) -> None:
    # Ctrl-C reaches all processes; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    body(*arguments, connection)


def _wait_for_end(connection: Connection) -> None:
    try:
        connection.recv()
    except (EOFError, OSError):
        return


def serve(folder: Path, connection: Connection) -> None:
    """Receive copies, as another host does; the object is the address."""
    server = Server(Directory(folder), KEY)
    connection.send(server.address)
    _wait_for_end(connection)
    server.close()


def sink(size: int, connection: Connection) -> None:
    """Receive ``size`` bytes into a buffer repeatedly, and acknowledge each time; the object is the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        connection.send(listener.getsockname())
        peer, _ = listener.accept()
    buffer = memoryview(bytearray(min(size, _PIECE)))
    with peer:
        peer.settimeout(None)
        while all(_receive(peer, buffer[: min(_PIECE, size - at)]) for at in range(0, size, _PIECE)):
            peer.sendall(b".")


def _receive(peer: socket.socket, into: memoryview) -> bool:
    while into:
        count = peer.recv_into(into, 0, socket.MSG_WAITALL)
        if not count:
            return False
        into = into[count:]
    return True


class PlainCopy:
    """The machine's own copy of bytes to another process: from one existing buffer over a socket to another.

    Args:
        address: The address of the :func:`sink`.
        size: The number of bytes.

    """

    def __init__(self, address: tuple[str, int], size: int) -> None:
        self._peer = socket.create_connection(address, PATIENCE)
        # Not only zeros: the system would map them to one page.
        self._buffer = memoryview(bytearray(os.urandom(1 << 16)) * -(-min(size, _PIECE) // (1 << 16)))
        self._size = size

    def measure(self) -> float:
        """Return the seconds of one copy."""
        started = time.perf_counter()
        for at in range(0, self._size, _PIECE):
            self._peer.sendall(self._buffer[: min(_PIECE, self._size - at)])
        answer = self._peer.recv(1)
        assert answer == b".", "the other process has ended"
        return time.perf_counter() - started

    def close(self) -> None:
        """Hang up."""
        self._peer.close()


def new_chain(memory: Directory, folder: Path, address: tuple[str, int]) -> Chain:
    """Return the chain that copies a rank's memory to another host, as in a run of two hosts.

    Args:
        memory: The memory; the rank is the first one.
        folder: Where to put the addresses.
        address: The address of the server there.

    """
    addresses = Addresses(Directory(folder), "benchmark")
    own, other = Address(0, "here", "127.0.0.1", 0), Address(1, "there", *address)
    for each in (own, other):
        addresses.write(each)
    names = partial(names_in, memory, rank_folder(0))
    return Chain(memory, [rank_folder(0)], names, own, addresses, KEY, world_size=2, replicas=1)


def wait_for_copies(chain: Chain) -> None:
    """Wait until a chain is up to date.

    Raises:
        TimeoutError: If it does not get there in time.

    """
    deadline = time.monotonic() + PATIENCE
    while chain.behind:
        if time.monotonic() > deadline:
            raise TimeoutError(f"copies have not arrived in {PATIENCE:.0f} s: {chain.trouble!r}")
        time.sleep(0.0005)
