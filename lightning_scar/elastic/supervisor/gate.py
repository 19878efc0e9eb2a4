"""Who gets in: stores listen on the loopback of node 0 only, and a gate leads there from other nodes, past a token.

Each of the other nodes has a tunnel: ports on its own loopback, from which every connection goes through the gate to a
store. So nobody who speaks to a store knows of the token: no worker, and no script that forms its own group.
"""

import asyncio
import hmac
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_scar.elastic.protocol.doorbell import LOOPBACK
from lightning_scar.elastic.supervisor.admission import SILENCE_SECONDS
from lightning_scar.elastic.supervisor.token import FILE, VARIABLE

_GREETING = b"lightning-scar gate 1\n"
#: Bytes of a nonce, and of a proof.
_BYTES = 32
#: Seconds for both ends to prove that they know the token.
_PATIENCE = 10
_PIECE = 1 << 16

_Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
T = TypeVar("T")


class NotLetInError(Exception):
    """The gate knows another token, or there is none."""


def loopback_store(port: int = 0) -> TCPStore:
    """Open a store that only this host can reach.

    Args:
        port: Its port; 0 for any free one.

    Raises:
        OSError: If the port is taken.

    """
    # A TCPStore would listen on all interfaces, whatever host it is given.
    listener = socket.create_server((LOOPBACK, port))
    return TCPStore(
        LOOPBACK,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        # Before, libuv did not take a socket.
        use_libuv=torch.__version__ >= "2.8",
        master_listen_fd=listener.detach(),
    )


class _Relay:
    """A thread that passes on what arrives at its ports, and what is answered."""

    def __init__(self) -> None:
        self._servers: list[asyncio.Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="scar-relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close all ports and connections; a second time does nothing."""
        if self._loop.is_closed():
            return
        self._run(self._cancel())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _cancel(self) -> None:
        for server in self._servers:
            server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self, port: socket.socket, lead: Callable[[_Streams], Awaitable[_Streams]]) -> None:
        """Connect whoever comes with what ``lead`` opens for him, or hang up if that raises."""

        async def serve(*caller: Any) -> None:
            # asyncio itself would complain of a task that is cancelled at the end.
            with suppress(OSError, EOFError, asyncio.TimeoutError, NotLetInError, asyncio.CancelledError):
                try:
                    _limit_silence(caller[1])
                    await _join(caller, await lead(caller))
                finally:
                    caller[1].close()

        self._servers.append(await asyncio.start_server(serve, sock=port))


class Gate(_Relay):
    """Node 0's end of all tunnels: a port on all its interfaces, behind which are the stores on its loopback.

    Who knows the token reaches any port of the loopback: it could do everything through the store in any case.

    Args:
        port: Where to listen; 0 for any free port.
        token: What members know.
        store: The port of the supervisor's store.
        tell_user: Called with each line that the user should read.

    Attributes:
        port: Where it listens.

    Raises:
        OSError: If the port is taken.

    """

    def __init__(self, port: int, token: bytes, store: int, tell_user: Callable[[str], None]) -> None:
        listener = _on_all_interfaces(port)
        super().__init__()
        self.port: int = listener.getsockname()[1]
        self._token = token
        self._store = store
        self._tell_user = tell_user
        self._has_told = False
        self._run(self._listen(listener, self._admit))

    async def _admit(self, caller: _Streams) -> _Streams:
        port = await asyncio.wait_for(self._port_for(*caller), _PATIENCE)
        return await asyncio.open_connection(LOOPBACK, port or self._store)

    async def _port_for(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
        nonce = secrets.token_bytes(_BYTES)
        writer.write(_GREETING + nonce)
        answer = await reader.readexactly(2 + 2 * _BYTES)
        asked, proof = answer[:-_BYTES], answer[-_BYTES:]
        if not hmac.compare_digest(proof, _proof(self._token, b"member", nonce, asked)):
            if not self._has_told:
                self._has_told = True
                address = writer.get_extra_info("peername")[0].removeprefix("::ffff:")
                self._tell_user(f"{address} does not know this job's token, and was turned away")
            raise NotLetInError
        writer.write(_proof(self._token, b"node 0", nonce, asked))
        return int.from_bytes(asked[:2], "big")


class Tunnel(_Relay):
    """Another node's way to the stores on node 0.

    Args:
        host: The address of node 0.
        port: The port of its gate.
        token: What the gate knows, too.

    Raises:
        NotLetInError: If it knows another one, or what answers there is no gate.
        OSError: If nobody answers.

    Example::

        >>> store = loopback_store()
        >>> gate = Gate(0, b"a token", store.port, print)
        >>> tunnel = Tunnel("127.0.0.1", gate.port, b"a token")
        >>> client = TCPStore(LOOPBACK, tunnel.port_to(store.port), is_master=False)
        >>> client.set("key", "value"), store.get("key")
        (None, b'value')
        >>> tunnel.close(), gate.close()
        (None, None)

    """

    def __init__(self, host: str, port: int, token: bytes) -> None:
        super().__init__()
        self._host = host
        self._port = port
        self._token = token
        self._ports: dict[int, int] = {}
        try:
            self._run(self._try())
        except BaseException:
            self.close()
            raise

    def port_to(self, store: int = 0) -> int:
        """Return the port here that leads to a store's port on node 0; 0 stands for the supervisor's."""
        if store not in self._ports:
            listener = socket.create_server((LOOPBACK, 0))
            self._ports[store] = listener.getsockname()[1]
            self._run(self._listen(listener, lambda _: self._enter(store)))
        return self._ports[store]

    async def _try(self) -> None:
        _, writer = await self._enter(0)
        writer.close()

    async def _enter(self, store: int) -> _Streams:
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(self._host, self._port), _PATIENCE)
            try:
                _limit_silence(writer)
                await asyncio.wait_for(self._prove(store, reader, writer), _PATIENCE)
            except BaseException:
                writer.close()
                raise
        except asyncio.TimeoutError:
            raise ConnectionError(f"no answer within {_PATIENCE} s") from None
        return reader, writer

    async def _prove(self, store: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        where = f"what answers at {self._host}:{self._port}"
        try:
            greeting = await reader.readexactly(len(_GREETING) + _BYTES)
        except EOFError:
            greeting = b""
        if not greeting.startswith(_GREETING):
            raise NotLetInError(f"{where} is no supervisor of this version of lightning-scar")
        nonce = greeting[len(_GREETING) :]
        asked = store.to_bytes(2, "big") + secrets.token_bytes(_BYTES)
        writer.write(asked + _proof(self._token, b"member", nonce, asked))
        try:
            proof = await reader.readexactly(_BYTES)
        except (EOFError, ConnectionError):
            proof = b""
        if not hmac.compare_digest(proof, _proof(self._token, b"node 0", nonce, asked)):
            raise NotLetInError(f"{where} knows another token: give all nodes the same {VARIABLE}, or copies of {FILE}")


def _proof(token: bytes, role: bytes, nonce: bytes, asked: bytes) -> bytes:
    """Return what only those can compute who know the token, for one role in one conversation."""
    return hmac.digest(token, role + nonce + asked, "sha256")


async def _join(one: _Streams, other: _Streams) -> None:
    """Pass on what arrives on either connection to the other one, until one is closed."""
    await asyncio.gather(_pass_on(one[0], other[1]), _pass_on(other[0], one[1]), return_exceptions=True)


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(_PIECE):
            sink.write(data)
            await sink.drain()
    finally:
        sink.close()


def _limit_silence(writer: asyncio.StreamWriter) -> None:
    """Let the kernel break a connection when the other end's kernel is silent for too long.

    Without that a question to a host that has vanished would wait for ever.
    """
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    half, milliseconds = SILENCE_SECONDS // 2, 1000 * SILENCE_SECONDS
    for name, value in {"KEEPIDLE": half, "KEEPINTVL": 1, "KEEPCNT": half, "USER_TIMEOUT": milliseconds}.items():
        # Not every system has them.
        if hasattr(socket, f"TCP_{name}"):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)


def _on_all_interfaces(port: int) -> socket.socket:
    with suppress(OSError):
        # A host may know the protocol, but have no address.
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))
