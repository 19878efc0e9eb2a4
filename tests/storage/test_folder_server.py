"""A served folder: files go there and come back whole, and whoever is not let in does no harm."""

import errno
import gc
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from toy_blocks import Spawn, meanwhile

from lightning_scar.storage import folder_server as folder_server_module
from lightning_scar.storage.folder_client import FolderClient, connect
from lightning_scar.storage.folder_protocol import Channel, FileInfo, NoRoomError
from lightning_scar.storage.folder_server import FolderServer

KEY = b"a secret of this test"
LARGE = 5_000_000


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder of the client's."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.fixture
def server(there: Path) -> Iterator[FolderServer]:
    with closing(FolderServer(there, KEY)) as server:
        yield server


@pytest.fixture
def client(server: FolderServer) -> Iterator[FolderClient]:
    with FolderClient(*server.address, KEY) as client:
        yield client


def written(path: Path, size: int, seed: int = 0) -> Path:
    block = bytes((seed + i) % 251 for i in range(251))
    path.write_bytes((block * (size // 251 + 1))[:size])
    return path


def sparse(path: Path, size: int) -> Path:
    """A file that is long and costs nothing."""
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def begin_put(channel: Channel, name: str, size: int) -> None:
    """Asks for a put, of which then nothing is sent."""
    channel.send({"do": "put", "name": name, "size": size})
    assert channel.receive() == {}


# -- files go there and come back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 70_000, LARGE])
def test_a_file_that_was_put_is_there_and_comes_back(client: FolderClient, here: Path, there: Path, size: int) -> None:
    source = written(here / "a", size)
    client.put("copies/of/a", source)
    data = source.read_bytes()
    assert (there / "copies/of/a").read_bytes() == data
    assert client.list("copies/of") == [FileInfo("a", size, False)]
    assert client.info("copies/of/a") == FileInfo("copies/of/a", size, False)
    assert client.read("copies/of/a") == data
    into = memoryview(bytearray(size))
    assert client.read_into("copies/of/a", 0, into) == size
    assert into == data


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 10), (3, 7), (5, 5), (7, 3), (0, None), (9, None), (-3, None), (0, -3), (8, 30), (30, 40)]
)
def test_parts_of_a_file_are_cut_as_slices_are(client: FolderClient, there: Path, start: int, stop: int | None) -> None:
    data = written(there / "a", 10).read_bytes()
    assert client.read("a", start, stop) == data[start:stop]


def test_memory_is_filled_as_far_as_the_file_goes(client: FolderClient, there: Path) -> None:
    data = written(there / "a", 10).read_bytes()
    into = bytearray(4)
    assert client.read_into("a", 8, memoryview(into)) == 2
    assert into[:2] == data[8:]
    assert client.read_into("a", 10, memoryview(into)) == 0
    assert client.read_into("a", 0, memoryview(into)) == 4
    assert into == data[:4]
    several = [bytearray(size) for size in (3, 0, 1, 4, 4)]
    assert client.read_into("a", 1, *map(memoryview, several)) == 9
    assert [bytes(m) for m in several] == [data[1:4], b"", data[4:5], data[5:9], data[9:10] + bytes(3)]


def test_a_put_replaces_and_a_delete_removes(client: FolderClient, here: Path, there: Path) -> None:
    client.put("a", written(here / "a", 10))
    client.put("a", written(here / "a", LARGE, seed=1))
    assert (there / "a").read_bytes() == (here / "a").read_bytes()
    client.delete("a")
    assert files_below(there) == []
    client.delete("a")
    client.delete("never/there")


def test_a_folder_is_listed_as_it_is(client: FolderClient, there: Path) -> None:
    assert client.list() == []
    written(there / "a", 3)
    (there / "below").mkdir()
    assert sorted(client.list()) == [FileInfo("a", 3, False), FileInfo("below", 0, True)]
    assert client.list("below") == []
    assert client.info("below") == FileInfo("below", 0, True)
    assert client.info("") == FileInfo("", 0, True)


def test_only_files_that_are_complete_are_listed(server: FolderServer, there: Path) -> None:
    with connect(*server.address, KEY, 30) as channel, FolderClient(*server.address, KEY) as client:
        begin_put(channel, "a", 100)
        assert len(files_below(there)) == 1
        assert client.list() == []
        assert not (there / "a").exists()


def test_readers_beside_puts_see_one_version_in_full(server: FolderServer, here: Path, there: Path) -> None:
    sources = [sparse(here / str(i), 300_000 + i) for i in range(4)]
    for i, source in enumerate(sources):
        source.write_bytes(bytes([i]) * (300_000 + i))
    stop = threading.Event()

    def keep_putting(name: str) -> None:
        with FolderClient(*server.address, KEY) as client:
            client.put(name, sources[0])
            while not stop.is_set():
                for source in sources:
                    client.put(name, source)

    def keep_reading(name: str) -> int:
        with FolderClient(*server.address, KEY) as client:
            for _ in range(60):
                data = client.read(name)
                assert data == bytes([data[0]]) * (300_000 + data[0])
                assert {info.name for info in client.list()} <= {"a", "b"}
        return 1

    with ThreadPoolExecutor(6) as pool:
        putting = [pool.submit(keep_putting, name) for name in "ab"]
        try:
            wait_for(lambda: (there / "a").exists() and (there / "b").exists())
            reading = [pool.submit(keep_reading, name) for name in "abab"]
            assert sum(reader.result() for reader in reading) == 4
        finally:
            stop.set()
        for putter in putting:
            putter.result()


# -- refusals --------------------------------------------------------------------------------------------------------


def test_errors_of_the_server_are_raised_and_the_connection_stays_usable(
    client: FolderClient, here: Path, there: Path
) -> None:
    source = written(here / "a", 10)
    written(there / "file", 1)
    (there / "folder").mkdir()
    for refused, kind in (
        (lambda: client.read("missing"), FileNotFoundError),
        (lambda: client.info("missing"), FileNotFoundError),
        (lambda: client.list("missing"), FileNotFoundError),
        (lambda: client.list("file"), NotADirectoryError),
        (lambda: client.read("folder"), IsADirectoryError),
        (lambda: client.put("folder", source), IsADirectoryError),
        (lambda: client.put("", source), IsADirectoryError),
        (lambda: client.put("file/below", source), OSError),
        (lambda: client.delete("folder"), OSError),
        (lambda: client.delete("."), IsADirectoryError),
        (lambda: client.read("nul\0"), OSError),
        (lambda: client.read("x" * 5000), OSError),
    ):
        with pytest.raises(kind) as raised:
            refused()
        assert not isinstance(raised.value, ConnectionError)
        client.put("good", source)
        assert client.read("good") == source.read_bytes()
    assert files_below(there) == ["file", "good"]


def test_an_error_names_the_file_and_the_server(client: FolderClient, server: FolderServer) -> None:
    with pytest.raises(FileNotFoundError, match=f"127.0.0.1:{server.address[1]}/a/missing"):
        client.read("a/missing")


def test_a_file_that_is_missing_here_is_reported_and_not_put(client: FolderClient, here: Path, there: Path) -> None:
    with pytest.raises(FileNotFoundError, match="here/missing"):
        client.put("a", here / "missing")
    assert client.list() == []


@pytest.mark.parametrize(
    "name", ["../outside", "..", "a/../../outside", "a/..", "/etc/passwd", "/", "out/outside", "link", "out/new"]
)
def test_nothing_outside_the_folder_can_be_reached(
    client: FolderClient, here: Path, there: Path, tmp_path: Path, name: str
) -> None:
    outside = written(tmp_path / "outside", 10, seed=7)
    (there / "out").symlink_to(tmp_path)
    (there / "link").symlink_to(outside)
    before = outside.read_bytes()
    source = written(here / "a", 10)
    for refused in (
        lambda: client.read(name),
        lambda: client.info(name),
        lambda: client.list(name),
        lambda: client.delete(name),
        lambda: client.put(name, source),
    ):
        with pytest.raises(PermissionError):
            refused()
    assert outside.read_bytes() == before
    assert files_below(tmp_path) == ["here/a", "outside", "there/link"]


def test_names_are_relative_to_the_folder_also_where_they_lead_into_it(client: FolderClient, there: Path) -> None:
    written(there / "a", 10)
    for name in (str(there / "a"), "x/../a"):
        with pytest.raises(PermissionError):
            client.read(name)


def test_links_within_the_folder_are_followed_and_endless_ones_refused(client: FolderClient, there: Path) -> None:
    data = written(there / "a", 10).read_bytes()
    (there / "link").symlink_to("a")
    (there / "endless").symlink_to("endless")
    assert client.read("link") == data
    with pytest.raises(OSError, match="symbolic links"):
        client.read("endless")


@pytest.mark.parametrize(
    "request_",
    [{}, {"do": "dance"}, {"do": "read"}, {"do": "list", "name": 5}, {"do": "put", "name": "a", "size": "x"}],
)
def test_a_request_that_is_not_understood_is_refused(
    server: FolderServer, there: Path, request_: dict[str, object]
) -> None:
    with connect(*server.address, KEY, 30) as channel:
        channel.send(request_)
        assert channel.receive()["errno"] == errno.EINVAL
        channel.send({"do": "list", "name": ""})
        assert channel.receive() == {"found": []}
    assert files_below(there) == []


def test_a_file_that_takes_no_more_leaves_the_connection_in_step() -> None:
    one, other = (Channel(end, timeout=30) for end in socket.socketpair())
    with one, other, open("/dev/full", "wb", buffering=0) as full, ThreadPoolExecutor(1) as pool:
        with open("/dev/zero", "rb", buffering=0) as zeros:
            sending = pool.submit(one.send_file, zeros.fileno(), 0, LARGE)
            with pytest.raises(OSError, match="No space left"):
                other.receive_file(full.fileno(), LARGE)
            sending.result()
        one.send({"do": "go on"})
        assert other.receive() == {"do": "go on"}


# -- the limit -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(there: Path) -> Iterator[FolderServer]:
    with closing(FolderServer(there, KEY, limit=1000)) as server:
        yield server


def test_puts_stay_within_the_limit_and_deletes_give_room_back(small: FolderServer, here: Path, there: Path) -> None:
    written(there / "own", 5000)
    source = written(here / "a", 400)
    with FolderClient(*small.address, KEY) as client:
        client.put("x/a", source)
        client.put("x/b", source)
        full = r"no room for 400 bytes, this rank has taken 800 of 1000 there: raise memory_limit: '.*/x/c'"
        with pytest.raises(NoRoomError, match=full):
            client.put("x/c", source)
        assert files_below(there) == ["own", "x/a", "x/b"]
        client.delete("x/b")
        client.put("x/c", source)
        client.put("x/small", written(here / "small", 200))
        with pytest.raises(NoRoomError):
            client.put("x/one byte", written(here / "one", 1))
        client.put("x/empty", written(here / "empty", 0))
        (there / "x/a").unlink()
        client.put("x/a", source)


def test_each_rank_has_room_of_its_own_for_all_its_starts(small: FolderServer, here: Path, there: Path) -> None:
    (there / "dead/rank-0000").mkdir(parents=True)
    written(there / "dead/rank-0000/a", 600)
    with FolderClient(*small.address, KEY) as client:
        with pytest.raises(NoRoomError, match="no room for 401 bytes, this rank has taken 600 of 1000"):
            client.put("live/rank-0000/a", written(here / "too large", 401))
        client.put("live/rank-0000/a", written(here / "fits", 400))
        client.put("live/rank-0001/a", written(here / "all", 1000))
        shutil.rmtree(there / "dead")
        client.put("live/rank-0000/b", written(here / "rest", 600))


def test_what_has_no_room_is_not_even_sent(small: FolderServer, here: Path) -> None:
    with connect(*small.address, KEY, 30) as channel:
        channel.send({"do": "put", "name": "a/b", "size": 1 << 40})
        assert channel.receive()["errno"] == errno.ENOSPC
        channel.send({"do": "list", "name": "a"})
        assert channel.receive() == {"found": []}


def test_puts_that_are_under_way_have_taken_their_room(small: FolderServer, here: Path) -> None:
    source = written(here / "a", 600)
    with FolderClient(*small.address, KEY) as client:
        with connect(*small.address, KEY, 30) as channel:
            begin_put(channel, "x/first", 600)
            with pytest.raises(NoRoomError):
                client.put("x/second", source)
            with open(source, "rb") as file:
                channel.send_file(file.fileno(), 0, 300)

        def fits() -> bool:
            try:
                client.put("x/second", source)
            except NoRoomError:
                return False
            return True

        # The first one has broken off in its middle.
        wait_for(fits)
        assert client.list("x") == [FileInfo("second", 600, False)]


# -- who is let in ---------------------------------------------------------------------------------------------------


def test_another_key_is_refused_and_the_right_one_goes_on_working(client: FolderClient, server: FolderServer) -> None:
    with pytest.raises(PermissionError, match="another key"):
        FolderClient(*server.address, b"another")
    assert client.list() == []
    with FolderClient(*server.address, KEY) as another:
        assert another.list() == []


def test_an_empty_key_is_refused(there: Path) -> None:
    with pytest.raises(ValueError, match="empty key"):
        FolderServer(there, b"")


def test_a_server_that_welcomes_everybody_is_not_believed() -> None:
    def pretend(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with Connection(peer.detach()) as connection:
            connection.send_bytes(b"#CHALLENGE#" + bytes(20))
            connection.recv_bytes()
            connection.send_bytes(b"#WELCOME#")
            connection.recv_bytes()
            connection.send_bytes(b"no digest")
            connection.recv_bytes()

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        pretending = pool.submit(pretend, listener)
        with pytest.raises(PermissionError, match="another key"):
            FolderClient("127.0.0.1", listener.getsockname()[1], KEY)
        pretending.result()


def test_no_server_or_something_else_there_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address: tuple[str, int] = listener.getsockname()
    with pytest.raises(ConnectionError, match=f"no folder server can be reached at 127.0.0.1:{address[1]}"):
        FolderClient(*address, KEY)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(ConnectionError, match="is no folder server"):
            FolderClient("127.0.0.1", listener.getsockname()[1], KEY, timeout=0.2)
        peer, _ = listener.accept()
        peer.close()


def test_garbage_and_silence_keep_nobody_waiting(server: FolderServer, there: Path) -> None:
    written(there / "a", 10)
    strangers = [socket.create_connection(server.address, timeout=30) for _ in range(40)]
    garbage = [b"", b"GET / HTTP/1.0\r\n\r\n", os.urandom(1000), b"\0\0\0\4true", b"\xff" * 12, b"\0" * 100_000]
    try:
        for i, stranger in enumerate(strangers):
            with suppress(ConnectionError):
                stranger.sendall(garbage[i % len(garbage)])
            with FolderClient(*server.address, KEY) as client:
                assert client.info("a").size == 10
    finally:
        for stranger in strangers:
            stranger.close()


def test_a_caller_who_stays_silent_is_sent_away(
    server: FolderServer, client: FolderClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_server_module, "PATIENCE", 0.2)
    with socket.create_connection(server.address, timeout=30) as silent:
        while silent.recv(1000):
            pass
    assert client.list() == []


def test_a_put_that_stands_still_is_given_up(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_server_module, "PATIENCE", 2)
    with closing(FolderServer(there, KEY)) as server, connect(*server.address, KEY, 30) as channel:
        begin_put(channel, "a", 100)
        wait_for(lambda: files_below(there) == [])
        with pytest.raises(ConnectionError):
            channel.receive()


def test_one_who_was_let_in_may_be_silent_between_two_requests(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_server_module, "PATIENCE", 2)
    with closing(FolderServer(there, KEY)) as server, FolderClient(*server.address, KEY) as client:
        time.sleep(3)
        assert client.list() == []


def serve(there: str, address: str, descriptors: int | None = None) -> None:
    """What a server's own process runs."""
    if descriptors is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    server = FolderServer(Path(there), KEY)
    Path(address + ".new").write_text(json.dumps(server.address))
    os.replace(address + ".new", address)
    threading.Event().wait()


@pytest.fixture
def serve_apart(spawn: Spawn, there: Path, tmp_path: Path) -> Callable[..., tuple[BaseProcess, tuple[str, int]]]:
    """Starts a server of the folder in a process of its own."""

    def start(descriptors: int | None = None) -> tuple[BaseProcess, tuple[str, int]]:
        address = tmp_path / "address"
        process = spawn(serve, str(there), str(address), descriptors)
        wait_for(address.exists)
        host, port = json.loads(address.read_text())
        return process, (host, port)

    return start


ServeApart = Callable[..., tuple[BaseProcess, tuple[str, int]]]


def test_a_server_that_ran_out_of_descriptors_works_again(serve_apart: ServeApart, there: Path) -> None:
    written(there / "a", 10)
    _, address = serve_apart(48)
    strangers = [socket.create_connection(address, timeout=30) for _ in range(80)]
    with pytest.raises(ConnectionError):
        FolderClient(*address, KEY, timeout=0.5)
    for stranger in strangers:
        stranger.close()
    with FolderClient(*address, KEY) as client:
        assert client.info("a").size == 10


# -- ends ------------------------------------------------------------------------------------------------------------


def be_killed_in_the_middle_of_a_put(address: tuple[str, int], name: str, path: str) -> None:
    with connect(*address, KEY, 30) as channel, open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        begin_put(channel, name, size)
        channel.send_file(file.fileno(), 0, size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_put_cut_off_by_sigkill_leaves_nothing_and_gives_its_room_back(spawn: Spawn, here: Path, there: Path) -> None:
    source = sparse(here / "a", 40_000_000)
    with closing(FolderServer(there, KEY, limit=40_000_000)) as server:
        for _ in range(2):
            process = spawn(be_killed_in_the_middle_of_a_put, server.address, "x/a", str(source))
            process.join(30)
            assert process.exitcode == -signal.SIGKILL
            wait_for(lambda: files_below(there) == [])
        with FolderClient(*server.address, KEY) as client:
            client.put("x/a", source)


def keep_putting(address: tuple[str, int], path: str) -> None:
    with FolderClient(*address, KEY) as client:
        for i in range(1_000_000):
            client.put(f"x/{i}", Path(path))
            if i >= 5:
                client.delete(f"x/{i - 5}")


def test_a_client_killed_at_any_time_leaves_whole_files_only(
    server: FolderServer, spawn: Spawn, here: Path, there: Path
) -> None:
    source = written(here / "a", LARGE)
    process = spawn(keep_putting, server.address, str(source))
    wait_for((there / "x/5").exists)
    process.kill()
    process.join()
    # One that was deleted may be kept for the next put.
    wait_for(lambda: len([name for name in files_below(there) if name.endswith(".tmp")]) <= 1)
    with FolderClient(*server.address, KEY) as client:
        client.put("x/next", source)
    wait_for(lambda: not [name for name in files_below(there) if name.endswith(".tmp")])
    left = files_below(there)
    assert len(left) > 1
    assert all((there / name).read_bytes() == source.read_bytes() for name in left)


@pytest.mark.parametrize("what", ["read", "put"])
def test_a_server_killed_in_the_middle_is_noticed(serve_apart: ServeApart, here: Path, there: Path, what: str) -> None:
    process, address = serve_apart()
    source = sparse(here / "a", 100_000_000)
    sparse(there / "a", 100_000_000)
    done: list[int] = []

    def go_on() -> None:
        into = memoryview(bytearray(100_000_000))
        with FolderClient(*address, KEY) as client:
            while True:
                client.put("b", source) if what == "put" else client.read_into("a", 0, into)
                done.append(1)

    with ThreadPoolExecutor(1) as pool:
        going_on = pool.submit(go_on)
        wait_for(lambda: done or going_on.done())
        process.kill()
        with pytest.raises(ConnectionError, match=f"lost the folder server at 127.0.0.1:{address[1]}"):
            going_on.result(60)


def test_what_a_killed_server_left_of_a_put_is_removed_by_the_next_one(serve_apart: ServeApart, there: Path) -> None:
    process, address = serve_apart()
    with connect(*address, KEY, 30) as channel:
        begin_put(channel, "x/a", 100)
        process.kill()
        process.join()
    written(there / "x/whole", 3)
    assert len(files_below(there)) == 2
    FolderServer(there, KEY).close()
    assert files_below(there) == ["x/whole"]


def test_a_server_that_stands_still_is_given_up_and_the_client_closed(serve_apart: ServeApart, there: Path) -> None:
    written(there / "a", 10)
    process, address = serve_apart()
    with FolderClient(*address, KEY, timeout=2) as client:
        assert client.info("a").size == 10
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(ConnectionError, match="nothing has moved for too long"):
            # More than once: the signal takes a moment to reach all of its threads.
            any(client.info("a") is None for _ in itertools.count())
        os.kill(process.pid, signal.SIGCONT)
        # The answer that comes too late must not be taken for the next one.
        assert client.is_closed
        with pytest.raises(ConnectionError):
            client.list()


def server_threads() -> int:
    return sum(thread.name.startswith("scar-folder") for thread in threading.enumerate())


def test_closing_hangs_up_on_everybody_and_leaves_the_folder(here: Path, there: Path) -> None:
    before = server_threads()
    sparse(there / "a", 100_000_000)
    server = FolderServer(there, KEY)
    client, silent = FolderClient(*server.address, KEY), socket.create_connection(server.address, timeout=30)
    putting, reading = (connect(*server.address, KEY, 30) for _ in range(2))
    with client, silent, putting, reading:
        assert client.info("a").size == 100_000_000
        begin_put(putting, "b", 100)
        # The server waits in the middle of this, for nobody takes the rest.
        reading.send({"do": "read", "name": "a", "start": 0, "stop": 100_000_000})
        reading.receive()
        assert server_threads() >= before + 4
        server.close()
        assert server_threads() == before
        assert files_below(there) == ["a"]
        with pytest.raises(ConnectionError):
            client.list()
        with pytest.raises(ConnectionError):
            putting.receive()
        with pytest.raises(ConnectionError):
            reading.receive_into(memoryview(bytearray(100_000_000)))
    with pytest.raises(ConnectionError):
        FolderClient(*server.address, KEY)
    server.close()


def test_a_closed_client_can_be_closed_again_and_no_longer_used(client: FolderClient) -> None:
    client.close()
    client.close()
    assert client.is_closed
    with pytest.raises(ConnectionError):
        client.list()


# -- what is left behind ---------------------------------------------------------------------------------------------


def test_nobody_else_can_read_what_was_put(client: FolderClient, here: Path, there: Path) -> None:
    source = written(here / "a", 10)
    source.chmod(0o666)
    mask = os.umask(0)
    try:
        client.put("x/y/a", source)
    finally:
        os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in there.rglob("*")}
    assert modes == {"x": 0o700, "y": 0o700, "a": 0o600}


def test_a_file_on_its_way_cannot_be_read_by_others_either(server: FolderServer, there: Path) -> None:
    mask = os.umask(0)
    try:
        with connect(*server.address, KEY, 30) as channel:
            begin_put(channel, "a", 10)
            [path] = there.iterdir()
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(mask)


def test_descriptors_and_threads_do_not_grow(server: FolderServer, here: Path, there: Path) -> None:
    source = written(here / "a", 1000)

    def used() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), server_threads()

    # Processes of other tests hold descriptors as well.
    gc.collect()
    before = used()
    with FolderClient(*server.address, KEY) as client:
        client.put("x/a", source)
        during = used()
        for i in range(300):
            client.put(f"x/{i}", source)
            client.read(f"x/{i}")
            with pytest.raises(FileNotFoundError):
                client.read("missing")
            client.delete(f"x/{i}")
        assert used() == during
    for _ in range(50):
        with FolderClient(*server.address, KEY) as client:
            client.list()
        with pytest.raises(PermissionError):
            FolderClient(*server.address, b"another")
    wait_for(lambda: used() == before)
    assert files_below(there) == ["x/a"]


def test_it_begins_while_other_processes_remove_folders_of_theirs(there: Path) -> None:
    def come_and_go() -> None:
        for name in "abcdefgh":
            (there / name / "rank-0000").mkdir(parents=True)
            shutil.rmtree(there / name)

    with meanwhile(come_and_go):
        for _ in range(200):
            FolderServer(there, KEY).close()
