"""The memory of another host: files come there whole, and whoever is not let in does no harm."""

import json
import os
import resource
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lightning_scar.storage import neighbour as neighbour_module
from lightning_scar.storage.channel import Channel
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.neighbour import PIECE, Neighbour, NoRoomError, Server

KEY = b"a secret of this test"
NAME = "rank-0001/delta-00001-00000000.safetensors"


def content(size: int, seed: int = 0) -> bytes:
    return bytes((seed + i) % 251 for i in range(251)) * (size // 251) + bytes(size % 251)


@pytest.fixture
def there(tmp_path: Path) -> Directory:
    (tmp_path / "there").mkdir(mode=0o700)
    return Directory(tmp_path / "there")


@pytest.fixture
def server(there: Directory) -> Iterator[Server]:
    with closing(Server(there, KEY)) as server:
        yield server


@pytest.fixture
def neighbour(server: Server) -> Iterator[Neighbour]:
    with closing(Neighbour(*server.address, KEY)) as neighbour:
        yield neighbour


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def raw(server: Server) -> Channel:
    """A caller that has been let in."""
    channel = Channel(socket.create_connection(server.address), timeout=10)
    channel.introduce(KEY)
    return channel


def files_below(there: Directory) -> list[str]:
    return sorted(str(path.relative_to(there.path)) for path in Path(there.path).rglob("*") if path.is_file())


# -- files come there --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[0], [1], [PIECE], [PIECE + 1], [3 * PIECE + 5, 7], []], ids=str)
def test_a_file_is_there_as_it_was_sent(neighbour: Neighbour, there: Directory, sizes: list[int]) -> None:
    pieces = [content(size, seed) for seed, size in enumerate(sizes)]
    neighbour.write(NAME, [memoryview(piece) for piece in pieces])
    assert there.read(NAME) == b"".join(pieces)
    assert neighbour.names("rank-0001") == [NAME.partition("/")[2]]
    neighbour.delete(NAME)
    neighbour.delete(NAME)
    assert neighbour.names("rank-0001") == []
    assert neighbour.names("rank-0002") == []


def test_a_file_takes_the_place_of_an_older_one(neighbour: Neighbour, there: Directory) -> None:
    neighbour.write(NAME, [b"old"])
    neighbour.write(NAME, [b"newer"])
    assert there.read(NAME) == b"newer"
    assert files_below(there) == [NAME]


def test_many_may_write_at_once(server: Server, there: Directory) -> None:
    def write(number: int) -> None:
        with closing(Neighbour(*server.address, KEY)) as neighbour:
            for i in range(20):
                neighbour.write(f"rank-{number:04d}/delta-{i}.safetensors", [content(1000, number + i)])
                neighbour.write(NAME, [content(5000)])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(2, 10)))
    assert len(files_below(there)) == 8 * 20 + 1
    assert there.read(NAME) == content(5000)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../escape.safetensors",
        "rank-0001/../../escape.safetensors",
        "/etc/escape.safetensors",
        "rank-0001/deeper/a.safetensors",
        "rank-0001/lease.json",
        "lease.json",
        "rank-1/a.safetensors",
        "rank-0001/.safetensors\0",
        "",
    ],
)
def test_only_deltas_of_ranks_can_be_reached(neighbour: Neighbour, there: Directory, name: str) -> None:
    Path(there.path).parent.joinpath("escape.safetensors").write_bytes(b"mine")
    for ask in (lambda: neighbour.write(name, [b"1"]), lambda: neighbour.delete(name)):
        with pytest.raises(PermissionError, match="only deltas of ranks"):
            ask()
    with pytest.raises(PermissionError, match="only rank folders"):
        neighbour.names(name)
    assert Path(there.path).parent.joinpath("escape.safetensors").read_bytes() == b"mine"
    assert files_below(there) == []
    neighbour.write(NAME, [b"it goes on"])


def test_a_link_in_the_name_of_a_rank_is_not_followed_out(neighbour: Neighbour, there: Directory) -> None:
    """Nobody but the user can make one: the folder is private. The name of a file is checked, not where it leads."""
    neighbour.write(NAME, [b"1"])
    assert os.stat(there.path).st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "request_", [{}, {"do": "anything"}, {"do": "put", "name": NAME}, {"do": "put", "name": NAME, "size": "many"}]
)
def test_what_is_not_understood_is_refused_and_the_conversation_goes_on(
    server: Server, request_: dict[str, object]
) -> None:
    channel = raw(server)
    channel.send(request_)
    assert "do all workers run the same version" in channel.receive()["reason"]
    channel.send({"do": "names", "name": "rank-0000"})
    assert channel.receive() == {"names": []}
    channel.close()


def test_a_limit_counts_all_files_of_a_rank(there: Directory) -> None:
    with closing(Server(there, KEY, limit=100)) as server, closing(Neighbour(*server.address, KEY)) as neighbour:
        neighbour.write("rank-0001/delta-1.safetensors", [bytes(60)])
        neighbour.write("rank-0002/delta-1.safetensors", [bytes(100)])
        with pytest.raises(NoRoomError, match="no room for 41 bytes, this rank has taken 60 of 100 there"):
            neighbour.write("rank-0001/delta-2.safetensors", [bytes(41)])
        neighbour.write("rank-0001/delta-2.safetensors", [bytes(40)])
        neighbour.delete("rank-0001/delta-1.safetensors")
        neighbour.write("rank-0001/delta-3.safetensors", [bytes(60)])


def test_a_disk_that_fills_up_half_way_is_told_and_leaves_nothing(there: Directory) -> None:
    with closing(Server(there, KEY)) as server, closing(Neighbour(*server.address, KEY)) as neighbour:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PIECE, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                neighbour.write(NAME, [bytes(6 * PIECE)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert files_below(there) == []
        neighbour.write(NAME, [b"it goes on"])
        assert there.read(NAME) == b"it goes on"


# -- who is not let in, and who goes -----------------------------------------------------------------------------------


def test_another_key_is_another_run(server: Server) -> None:
    with pytest.raises(ConnectionError, match="has another key"):
        Neighbour(*server.address, b"guessed")
    with closing(Neighbour(*server.address, KEY)) as neighbour:
        assert neighbour.names("rank-0000") == []


def test_a_server_with_another_key_is_not_believed(there: Directory) -> None:
    with closing(Server(there, b"a thief's")) as server, pytest.raises(ConnectionError):
        Neighbour(*server.address, KEY)


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"\xff" * 5000])
def test_strangers_do_no_harm(server: Server, neighbour: Neighbour, noise: bytes) -> None:
    for _ in range(5):
        with socket.create_connection(server.address) as stranger:
            stranger.sendall(noise)
    neighbour.write(NAME, [b"1"])


def test_nothing_that_arrives_is_unpickled(server: Server) -> None:
    channel = raw(server)
    connection: Connection = channel._connection
    connection.send(os.getpid)
    with pytest.raises(ConnectionError):
        channel.receive()


def test_a_caller_that_stops_in_the_middle_is_let_go_of(there: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbour_module, "PATIENCE", 0.3)
    with closing(Server(there, KEY)) as server:
        silent = socket.create_connection(server.address)
        stopped = raw(server)
        stopped.send({"do": "put", "name": NAME, "size": 10 * PIECE})
        assert stopped.receive() == {}
        stopped.send_data(memoryview(bytes(PIECE)))
        with pytest.raises(ConnectionError):
            stopped.receive(patient=True)
        wait_for(lambda: not server._callers)
        assert files_below(there) == []
        silent.close()


def test_a_server_that_stops_in_the_middle_is_an_error_in_time(there: Directory) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        started = time.monotonic()
        with pytest.raises(ConnectionError, match="timed out"):
            Neighbour(*deaf.getsockname(), KEY, timeout=0.5)
        assert time.monotonic() - started < 20


def test_nobody_there_is_a_connection_error(server: Server) -> None:
    address = server.address
    server.close()
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{address[1]} cannot be reached"):
        Neighbour(*address, KEY)


def test_its_end_hangs_up_on_everybody(there: Directory) -> None:
    before = threading.active_count()
    server = Server(there, KEY)
    neighbour = Neighbour(*server.address, KEY)
    busy = raw(server)
    busy.send({"do": "put", "name": NAME, "size": 10 * PIECE})
    assert busy.receive() == {}
    server.close()
    assert threading.active_count() == before
    with pytest.raises(ConnectionError):
        neighbour.names("rank-0000")
    assert files_below(there) == []


def test_memory_that_somebody_has_removed_is_made_again(neighbour: Neighbour, there: Directory) -> None:
    neighbour.write(NAME, [b"1"])
    shutil.rmtree(there.path)
    assert neighbour.names("rank-0001") == []
    neighbour.write(NAME, [b"2"])
    assert there.read(NAME) == b"2"


def test_messages_may_not_be_endless(server: Server) -> None:
    channel = raw(server)
    with suppress(ConnectionError):
        channel._connection.send_bytes(json.dumps({"do": "x" * (1 << 25)}).encode())
        channel.receive()
    wait_for(lambda: not server._callers)
