"""Who gets to the stores of node 0: whoever knows the token, by a tunnel, and nobody else."""

import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from lightning_scar.elastic.supervisor import gate as gates
from lightning_scar.elastic.supervisor.gate import Gate, NotLetInError, Tunnel, loopback_store
from lightning_scar.elastic.supervisor.token import FILE, VARIABLE, TokenError, find_token

TOKEN = b"what only members know"


class Front:
    """A store behind a gate, and what the user of node 0 was told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.store = loopback_store()
        self.gate = Gate(0, TOKEN, self.store.port, self.told.append)
        self.store.set("key", "true")

    def caller(self) -> socket.socket:
        """Somebody who knows nothing."""
        caller = socket.create_connection(("127.0.0.1", self.gate.port), timeout=10)
        assert read(caller, len(GREETING)) == GREETING
        return caller


GREETING = gates._GREETING


@pytest.fixture
def front() -> Iterator[Front]:
    front = Front()
    with closing(front.gate):
        yield front


def client(port: int, seconds: int = 10) -> TCPStore:
    return TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))


def read(source: socket.socket, size: int) -> bytes:
    """As much of it as comes before the other end hangs up."""
    data = b""
    while len(data) < size and (piece := source.recv(size - len(data))):
        data += piece
    return data


def is_hung_up(caller: socket.socket) -> bool:
    try:
        return caller.recv(1) == b""
    except ConnectionResetError:
        return True


# -- members -------------------------------------------------------------------------------------------------------


def test_only_this_host_reaches_a_store() -> None:
    store = loopback_store()
    listening = [c.laddr for c in psutil.Process().net_connections("inet") if c.laddr.port == store.port]
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_every_store_is_reached_through_one_gate(front: Front) -> None:
    other = loopback_store()
    other.set("key", "of the other one")
    with closing(Tunnel("localhost", front.gate.port, TOKEN)) as tunnel:
        own = client(tunnel.port_to())
        own.set("key", b"x" * (4 << 20))
        assert own.get("key") == b"x" * (4 << 20) == front.store.get("key")
        assert client(tunnel.port_to(other.port)).get("key") == b"of the other one"
        assert tunnel.port_to() == tunnel.port_to()


def test_an_end_of_the_gate_is_an_error_for_whoever_waits_behind_it(front: Front) -> None:
    with closing(Tunnel("127.0.0.1", front.gate.port, TOKEN)) as tunnel:
        store = client(tunnel.port_to(), seconds=60)
        timer = threading.Timer(0.2, front.gate.close)
        timer.start()
        with pytest.raises(DistError):
            store.get("what nobody says")
        timer.join()


def test_a_store_that_is_gone_is_an_error(front: Front) -> None:
    with closing(Tunnel("127.0.0.1", front.gate.port, TOKEN)) as tunnel, pytest.raises(DistError):
        client(tunnel.port_to(1), seconds=1)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
def test_the_kernel_breaks_a_connection_whose_peer_is_silent(front: Front) -> None:
    with closing(Tunnel("127.0.0.1", front.gate.port, TOKEN)) as tunnel:
        store = client(tunnel.port_to())
        assert store.get("key") == b"true"
        led = [c for c in psutil.Process().net_connections("tcp4") if c.raddr and c.raddr.port == front.gate.port]
        [descriptor] = [c.fd for c in led if c.status == psutil.CONN_ESTABLISHED]
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


# -- strangers -----------------------------------------------------------------------------------------------------


def test_another_token_is_refused_with_the_remedy_and_told_once(front: Front) -> None:
    for _ in range(2):
        with pytest.raises(NotLetInError, match=f"another token.*{VARIABLE}.*{FILE}"):
            Tunnel("127.0.0.1", front.gate.port, b"what somebody thinks it is")
    assert front.told == ["127.0.0.1 does not know this job's token, and was turned away"]


def test_a_store_s_client_reads_and_writes_nothing(front: Front) -> None:
    with pytest.raises((DistError, RuntimeError)):
        client(front.gate.port, seconds=1)
    # What such a client says to make "key" "false", said at once.
    words = b"".join(len(word).to_bytes(8, "little") + word for word in (b"/key", b"false"))
    forged = b"\x00\xce\xf7\x85\x3c" + b"\x01" + words
    with front.caller() as caller:
        caller.sendall(forged + bytes(100))
        assert read(caller, 1000)[gates._BYTES :] == b""
    assert front.store.get("key") == b"true"
    # To a store itself it could have been said.
    with socket.create_connection(("127.0.0.1", front.store.port)) as caller:
        caller.sendall(forged)
        caller.shutdown(socket.SHUT_WR)
        assert is_hung_up(caller)
    assert front.store.get("key") == b"false"


def test_a_proof_is_good_for_one_conversation(front: Front) -> None:
    with front.caller() as caller:
        nonce, asked = read(caller, gates._BYTES), bytes(2 + gates._BYTES)
        answer = asked + gates._proof(TOKEN, b"member", nonce, asked)
        caller.sendall(answer)
        # The gate's own proof does not do for a member's, either.
        proof = read(caller, gates._BYTES)
        assert len(proof) == gates._BYTES
    for said in (answer, asked + proof):
        with front.caller() as caller:
            read(caller, gates._BYTES)
            caller.sendall(said)
            assert is_hung_up(caller)


def test_a_proof_is_for_one_port(front: Front) -> None:
    with front.caller() as caller:
        nonce, asked = read(caller, gates._BYTES), bytes(2 + gates._BYTES)
        caller.sendall(b"\x00\x16" + asked[2:] + gates._proof(TOKEN, b"member", nonce, asked))
        assert is_hung_up(caller)


def test_who_says_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_PATIENCE", 0.1)
    front = Front()
    with closing(front.gate), front.caller() as caller:
        read(caller, gates._BYTES)
        assert is_hung_up(caller)
    assert not front.told


@pytest.mark.parametrize("says", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", GREETING + bytes(gates._BYTES), b"silence"])
def test_nothing_is_said_to_what_only_looks_like_a_gate(says: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_PATIENCE", 0.5)
    heard: list[bytes] = []

    def answer(server: socket.socket) -> None:
        with server.accept()[0] as caller:
            if says != b"silence":
                caller.sendall(says)
                caller.shutdown(socket.SHUT_WR)
            heard.append(read(caller, 1000))

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=[server])
        thread.start()
        with pytest.raises((NotLetInError, ConnectionError)):
            Tunnel("127.0.0.1", server.getsockname()[1], TOKEN)
        thread.join()
    # At most a proof, from which nobody learns the token.
    assert [len(data) for data in heard] == [2 + 2 * gates._BYTES if says.startswith(GREETING) else 0]


# -- the token -----------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is, if it is nowhere else."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE)
    return Path(FILE).expanduser()


def test_node_0_makes_a_file_for_its_owner_alone_and_the_others_read_it(file: Path) -> None:
    with pytest.raises(TokenError, match=f"copy of {FILE} of node 0.*{VARIABLE}"):
        find_token(make=False)
    token = find_token(make=True)
    assert len(token) >= 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert find_token(make=False) == token == find_token(make=True)
    assert os.listdir(file.parent) == [file.name]


def test_the_environment_comes_before_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, " of the environment\n")
    assert find_token(make=True) == b"of the environment"
    assert not file.exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_may_know_is_refused(file: Path, mode: int) -> None:
    find_token(make=True)
    file.chmod(mode)
    for make in (True, False):
        with pytest.raises(TokenError, match=f"{file}.*mode {mode:o}"):
            find_token(make)


def test_a_token_that_could_be_guessed_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.touch(0o600)
    with pytest.raises(TokenError, match="shorter than 16"):
        find_token(make=True)
    monkeypatch.setenv(VARIABLE, "secret")
    with pytest.raises(TokenError, match=f"{VARIABLE} is shorter than 16"):
        find_token(make=True)


def test_where_no_file_can_be_made_the_environment_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(file.parent / "nowhere"))
    with pytest.raises(TokenError, match=VARIABLE):
        find_token(make=True)
