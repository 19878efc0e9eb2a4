"""A folder of another host is read as any directory is."""

import gc
import io
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import fsspec
import pytest
from toy_blocks import FIRST, check, content, newest, read, save

from lightning_scar.storage.directory import Directory
from lightning_scar.storage.folder_client import FolderClient
from lightning_scar.storage.folder_server import FolderServer
from lightning_scar.storage.head import Version
from lightning_scar.storage.neighbour import PROTOCOL, NeighbourFileSystem
from lightning_scar.storage.rank_store import RankStore
from lightning_scar.storage.reading import Reading, fill
from lightning_scar.storage.store import DeltaStore

KEY = b"a secret of this test"
OPTIONS = {"key": KEY}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FolderServer]:
    with closing(FolderServer(tmp_path, KEY)) as server:
        yield server


@pytest.fixture
def url(server: FolderServer) -> str:
    host, port = server.address
    return f"{PROTOCOL}://{host}:{port}/"


@pytest.fixture
def files(server: FolderServer) -> NeighbourFileSystem:
    return NeighbourFileSystem(*server.address, KEY)


def test_a_folder_is_listed_and_read_as_it_is_now(url: str, tmp_path: Path) -> None:
    folder = Directory(url, OPTIONS)
    assert folder.names() == []
    assert folder.child("below").names() == []
    (tmp_path / "below").mkdir()
    (tmp_path / "a").write_bytes(b"1234")
    (tmp_path / "below/b").write_bytes(b"5678")
    assert folder.names() == ["a", "below"]
    assert folder.child("below").names() == ["b"]
    assert folder.child("a").names() == []
    assert folder.read("a") == b"1234"
    assert folder.child("below").read("b") == folder.read("below/b") == b"5678"
    with folder.open("a") as file:
        file.seek(1)
        assert file.read() == b"234"
    (tmp_path / "a").unlink()
    assert folder.names() == ["below"]


def test_what_a_file_system_tells_of_files_and_folders(files: NeighbourFileSystem, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below/a").write_bytes(b"1234")
    file = {"name": "/below/a", "size": 4, "type": "file"}
    folder = {"name": "/below", "size": 0, "type": "directory"}
    assert files.ls("/") == files.ls("") == [folder]
    assert files.ls("below") == files.ls("/below/") == [file]
    assert files.ls("below", detail=False) == ["/below/a"]
    assert files.ls("below/a") == [file]
    assert files.info("below/a") == file
    assert files.info("/below") == folder
    assert files.find("/") == ["/below/a"]
    assert files.exists("below/a")
    assert not files.exists("below/b")
    assert files.isdir("below")
    for missing in (files.ls, files.info, files.cat_file, files.open):
        with pytest.raises(FileNotFoundError):
            missing("missing")


@pytest.mark.parametrize(
    ("start", "end"), [(None, None), (2, 5), (3, None), (None, 4), (-3, None), (None, -2), (8, 20)]
)
def test_parts_of_a_file_are_cut_as_slices_are(
    files: NeighbourFileSystem, tmp_path: Path, start: int | None, end: int | None
) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    assert files.cat_file("a", start, end) == b"0123456789"[start:end]


def test_an_open_file_is_read_from_any_place(files: NeighbourFileSystem, tmp_path: Path) -> None:
    data = bytes(i % 251 for i in range(1_000_000))
    (tmp_path / "a").write_bytes(data)
    with files.open("a") as file:
        for start, size in ((0, 10), (500_000, 300_000), (5, 100_000), (999_990, 100), (1_000_000, 5), (2_000_000, 5)):
            file.seek(start)
            assert file.read(size) == data[start : start + size]
        assert file.seek(-10, io.SEEK_END) == 999_990
        assert file.read() == data[-10:]
        with pytest.raises(ValueError, match="cannot seek to -1"):
            file.raw.seek(-1)
    with files.open("a") as file:
        assert file.read() == data
    (tmp_path / "text").write_text("two\nlines")
    with files.open("text", "r") as lines:
        assert list(lines) == ["two\n", "lines"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each request asks for."""
    asked: list[int] = []
    read_into = FolderClient.read_into

    def noted(client: FolderClient, name: str, start: int, *into: memoryview) -> int:
        asked.append(sum(map(len, into)))
        return read_into(client, name, start, *into)

    monkeypatch.setattr(FolderClient, "read_into", noted)
    return asked


def test_a_whole_block_is_fetched_in_one_request_and_no_byte_besides(
    url: str, tmp_path: Path, asked: list[int]
) -> None:
    (tmp_path / "a").write_bytes(bytes(10_000_000))
    with Directory(url, OPTIONS).source("a") as source:
        for start in (5_000_000, 400_000, 0):
            assert source.fill([(start, memoryview(bytearray(400_000)))])
    assert asked == [400_000] * 3


def test_nothing_can_be_written(url: str, tmp_path: Path) -> None:
    folder = Directory(url, OPTIONS)
    folder.create()
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="read-only"):
        folder.write("a", [b"new"])
    with pytest.raises(OSError, match="NotImplementedError"):
        folder.delete("a")
    assert folder.read("a") == b"old"


@pytest.mark.parametrize("url", [f"{PROTOCOL}://host/", f"{PROTOCOL}://:4711/"])
def test_an_url_that_leads_to_no_server_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="scar-neighbour://host:port/"):
        fsspec.core.url_to_fs(url, **OPTIONS)


def test_a_neighbour_with_another_key_or_none_at_all_is_reported(url: str, server: FolderServer) -> None:
    with pytest.raises(PermissionError, match="another key"):
        Directory(url, {"key": b"another"}).names()
    server.close()
    with pytest.raises(ConnectionError, match="no folder server"):
        Directory(url, OPTIONS).names()


def test_instances_share_nothing(url: str) -> None:
    assert Directory(url, OPTIONS).fs is not Directory(url, OPTIONS).fs


def test_threads_do_not_share_a_connection_and_connections_are_used_again(server: FolderServer, tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 200_000)
    files = NeighbourFileSystem(*server.address, KEY)
    together = threading.Barrier(8)

    def read_often(i: int) -> bool:
        with files.client():
            # All eight have one now.
            together.wait(30)
        return all(files.cat_file(str(i)) == bytes([i]) * 200_000 for _ in range(30))

    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read_often, range(8)))
    assert len(callers(server)) == 8


def callers(server: FolderServer) -> list[threading.Thread]:
    # A caller may have been answered before it is entered.
    with server._lock:
        return list(server._callers.values())


def test_connections_end_with_the_file_system(server: FolderServer, recwarn: pytest.WarningsRecorder) -> None:
    files = NeighbourFileSystem(*server.address, KEY)
    files.ls("/")
    [thread] = callers(server)
    warnings.simplefilter("always")
    del files
    gc.collect()
    assert not [warning for warning in recwarn if warning.category is ResourceWarning]
    thread.join(30)
    assert not thread.is_alive()


# -- a delta store ---------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> RankStore:
    """Some real deltas, as a rank wrote them to the served folder."""
    store = RankStore(str(tmp_path))
    keys = [f"b{i}" for i in range(300)]
    save(store, keys, FIRST, size=20_000, consistent=FIRST)
    save(store, keys[:40], Version(1, 1, 10), size=20_000, consistent=FIRST)
    save(store, ["large"], Version(1, 2, 20), size=3_000_000, consistent=FIRST)
    return store


def test_a_delta_store_there_holds_what_the_one_here_does(store: RankStore, url: str, tmp_path: Path) -> None:
    here, there = DeltaStore(tmp_path), DeltaStore(url, OPTIONS)
    assert check(there) == check(here)
    assert len(newest(there)) == 301
    assert [delta.name for delta in there.deltas] == [delta.name for delta in here.deltas]
    assert [delta.head for delta in there.deltas] == [delta.head for delta in here.deltas]
    assert there.index.consistent == here.index.consistent == FIRST.mark
    assert there.verify() == []
    assert not there.is_empty()
    assert there.foreign_names() == there.missing_folders() == []
    for key in ("b0", "b299", "large"):
        for at in there.index.versions(key):
            assert read(there, at) == content(key, at.block.version, at.block.nbytes)


def test_blocks_that_lie_together_are_fetched_together_and_no_byte_besides(
    store: RankStore, url: str, asked: list[int]
) -> None:
    there = DeltaStore(url, OPTIONS)
    there.refresh()
    located = [there.index.versions(f"b{i}")[0] for i in range(300)]
    memories = [at.block.new_memory() for at in located]
    asked.clear()
    assert fill([Reading(at, lambda m=m: m) for at, m in zip(located, memories, strict=True)]) == []
    assert [bytes(m["param"]) for m in memories] == [content(at.block.key, at.block.version, 20_000) for at in located]
    assert sum(asked) == 300 * 20_000
    assert len(asked) < 300 / 20


def test_damage_there_is_found(store: RankStore, url: str, tmp_path: Path) -> None:
    at = store.index.versions("large")[0]
    path = tmp_path / at.delta.name
    data = bytearray(path.read_bytes())
    data[at.block.slots["param"].start] ^= 255
    path.write_bytes(data)
    there = DeltaStore(url, OPTIONS)
    assert [damage.block for damage in there.verify()] == ["large"]
    path.write_bytes(data[:-1000])
    there = DeltaStore(url, OPTIONS)
    there.refresh()
    assert len(there.damaged) == 1


def test_a_delta_that_vanishes_there_is_noticed(store: RankStore, url: str, tmp_path: Path) -> None:
    there = DeltaStore(url, OPTIONS)
    there.refresh()
    at = there.index.versions("large")[0]
    (tmp_path / at.delta.name).unlink()
    with pytest.raises(FileNotFoundError):
        fill([Reading(at, at.block.new_memory)])
    there.refresh()
    assert "large" not in newest(there)


def test_a_reader_follows_while_the_neighbour_goes_on_saving(store: RankStore, url: str) -> None:
    there = DeltaStore(url, OPTIONS)
    last = check(there)
    for sequence in range(3, 20):
        version = Version(1, sequence, 10 * sequence)
        save(store, [f"b{sequence}", "large"], version, size=20_000, state_bytes=9_000_000, consistent=FIRST)
        now = check(there)
        assert now["large"] == version
        assert all(now[key] >= last[key] for key in last)
        last = now


def test_a_neighbour_that_ends_is_an_error_and_no_damage_is_hidden(
    store: RankStore, url: str, server: FolderServer
) -> None:
    there = DeltaStore(url, OPTIONS)
    there.refresh()
    server.close()
    with pytest.raises(ConnectionError):
        there.refresh()
    at = there.index.versions("large")[0]
    with pytest.raises(ConnectionError):
        fill([Reading(at, at.block.new_memory)])
