"""The pages of a deleted copy are used for the next one, and nobody sees anything of it."""

import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from toy_blocks import Spawn

from lightning_scar.storage import spare_file
from lightning_scar.storage.folder_client import FolderClient
from lightning_scar.storage.folder_protocol import NoRoomError
from lightning_scar.storage.folder_server import FolderServer
from lightning_scar.storage.spare_file import SpareFile

KEY = b"a secret of this test"
SIZE = 2_000_000

Put = Callable[..., bytes]


@pytest.fixture
def server(there: Path) -> Iterator[FolderServer]:
    with closing(FolderServer(there, KEY, limit=3 * SIZE)) as server:
        yield server


@pytest.fixture
def client(server: FolderServer) -> Iterator[FolderClient]:
    with FolderClient(*server.address, KEY) as client:
        yield client


@pytest.fixture
def put(client: FolderClient, tmp_path: Path) -> Put:
    """Puts random bytes, and returns them."""

    def put(name: str, size: int = SIZE) -> bytes:
        data = os.urandom(size)
        (tmp_path / "source").write_bytes(data)
        client.put(name, tmp_path / "source")
        return data

    return put


def all_below(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_a_put_takes_the_place_of_a_deleted_copy(client: FolderClient, put: Put, there: Path) -> None:
    put("x/kept")
    put("x/old")
    before = (there / "x/old").stat().st_ino
    client.delete("x/old")
    data = put("y/new")
    assert (there / "y/new").stat().st_ino == before
    assert (there / "y/new").read_bytes() == data
    assert all_below(there) == {"kept", "new"}


@pytest.mark.parametrize("size", [0, 1, SIZE // 2, SIZE - 1, SIZE + 1, 2 * SIZE])
def test_a_copy_is_right_whatever_lay_there_before(client: FolderClient, put: Put, there: Path, size: int) -> None:
    put("x/kept", 10)
    put("x/old")
    client.delete("x/old")
    data = put("x/new", size)
    assert (there / "x/new").read_bytes() == client.read("x/new") == data


def test_what_is_kept_is_not_seen_and_is_no_more_than_the_last_put(client: FolderClient, put: Put, there: Path) -> None:
    put("x/old", 2 * SIZE)
    put("x/kept", SIZE)
    client.delete("x/old")
    assert [found.name for found in client.list("x")] == ["kept"]
    [hidden] = [path for path in (there / "x").iterdir() if path.name != "kept"]
    assert hidden.stat().st_size == SIZE
    client.delete("x/old")
    assert hidden.exists()


@pytest.mark.parametrize("is_mapped", [False, True], ids=["open", "mapped"])
def test_whoever_has_a_deleted_copy_open_sees_it_as_it_was(
    client: FolderClient, put: Put, there: Path, is_mapped: bool
) -> None:
    put("x/kept")
    data = put("x/old")
    with open(there / "x/old", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        if is_mapped:
            file.close()
        client.delete("x/old")
        put("x/new")
        assert (mapped[:] if is_mapped else file.read()) == data


def test_what_a_caller_has_read_is_not_written_over(client: FolderClient, put: Put, there: Path) -> None:
    put("x/kept")
    put("x/old")
    # Its pages may be on their way still, for all that the server knows.
    client.read("x/old", 0, 1)
    client.delete("x/old")
    assert all_below(there) == {"kept"}


def test_what_is_kept_takes_no_room_from_others(client: FolderClient, put: Put, there: Path) -> None:
    put("x/kept")
    put("x/old")
    client.delete("x/old")
    data = put("x/large", 2 * SIZE)
    assert (there / "x/large").read_bytes() == data
    with pytest.raises(NoRoomError):
        put("x/one byte", 1)
    client.delete("x/kept")
    with pytest.raises(NoRoomError, match=f"no room for {SIZE + 1} bytes, .* taken {2 * SIZE} of {3 * SIZE} there"):
        put("x/too large", SIZE + 1)
    put("x/fits", SIZE)


def test_what_is_kept_is_not_kept_beyond_its_use(
    server: FolderServer, client: FolderClient, put: Put, there: Path
) -> None:
    for name in ("x/a", "x/b"):
        put(name)
    client.delete("x/a")
    client.delete("x/b")
    assert all_below(there) == set()
    for name in ("x/a", "x/b"):
        put(name)
    client.delete("x/a")
    server.close()
    assert all_below(there) == {"b"}


def keeps_what_somebody_opens(folder: Path) -> None:
    """A search through all files comes by while it is asked whether anybody has one open."""
    control = fcntl.fcntl

    def opening(descriptor: int, what: int, value: int) -> int:
        if value == fcntl.F_UNLCK:
            with suppress(BlockingIOError):
                os.close(os.open(folder / "hidden", os.O_RDONLY | os.O_NONBLOCK))
        return control(descriptor, what, value)

    spare_file.fcntl.fcntl = opening
    SpareFile().delete(folder / "old", folder / "hidden", at_most=SIZE)


def test_whoever_opens_a_file_meanwhile_does_not_end_the_process(tmp_path: Path, spawn: Spawn) -> None:
    (tmp_path / "old").write_bytes(bytes(SIZE))
    process = spawn(keeps_what_somebody_opens, tmp_path)
    process.join(30)
    assert process.exitcode == 0


def test_a_kept_file_that_somebody_has_removed_is_not_missed(client: FolderClient, put: Put, there: Path) -> None:
    put("x/kept", 10)
    put("x/old")
    client.delete("x/old")
    for path in (there / "x").glob(".*"):
        path.unlink()
    data = put("x/new")
    assert (there / "x/new").read_bytes() == data


def test_nothing_is_kept_where_nobody_can_tell_who_has_it_open(
    client: FolderClient, put: Put, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(spare_file.fcntl, "F_SETLEASE")
    put("x/kept")
    put("x/old")
    client.delete("x/old")
    assert all_below(there) == {"kept"}
