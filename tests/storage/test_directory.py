"""Files are written whole or not at all, and listed as they are now."""

import asyncio
import gc
import os
import re
import signal
import threading
import tracemalloc
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

import aiohttp
import botocore.exceptions
import fsspec
import pytest
import s3fs
from hypothesis import given
from hypothesis import strategies as st
from toy_blocks import Spawn

from lightning_scar.storage.directory import Directory


def test_a_written_file_is_listed_and_reads_back(url: str) -> None:
    folder = Directory(url)
    folder.create()
    folder.write("b", [b"12", memoryview(b"34")])
    folder.write("a", [])
    assert folder.names() == ["a", "b"]
    assert folder.read("b") == b"1234"
    assert folder.read("a") == b""
    with folder.open("b") as file:
        file.seek(1)
        assert file.read() == b"234"


def test_a_folder_that_does_not_exist_holds_nothing(url: str) -> None:
    assert Directory(url).names() == []
    assert Directory(url).names("below") == []


def test_a_file_in_the_place_of_the_folder_is_no_folder(file_url: str) -> None:
    Path(file_url).write_bytes(b"a file")
    assert Directory(file_url).names() == []
    with pytest.raises(OSError, match="store"):
        Directory(file_url).create()


def test_a_missing_file_is_reported_and_deleting_it_is_no_error(url: str) -> None:
    folder = Directory(url)
    folder.create()
    folder.delete("missing")
    with pytest.raises(FileNotFoundError):
        folder.read("missing")
    with pytest.raises(FileNotFoundError), folder.open("missing") as file:
        file.read()


def test_a_deleted_file_is_gone(url: str) -> None:
    folder = Directory(url)
    folder.create()
    folder.write("a", [b"1"])
    folder.delete("a")
    assert folder.names() == []


def test_a_folder_below_is_made_by_what_is_written_to_it(url: str) -> None:
    folder = Directory(url)
    folder.write("below/a", [b"12"])
    assert folder.names() == ["below"]
    assert folder.names("below") == ["a"]
    assert folder.read("below/a") == b"12"
    assert (folder.bytes_in("below"), folder.bytes_in("elsewhere")) == (2, 0)


def test_a_relative_path_stays_where_it_was_when_the_process_changes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Directory("relative")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    folder.write("below/a", [b"1"])
    assert folder.names("below") == ["a"]
    assert (tmp_path / "relative" / "below" / "a").exists()


def test_storage_options_lead_to_the_file_system(s3_server: str, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    folder = Directory(f"{s3_url}/a", {"client_kwargs": {"endpoint_url": s3_server}})
    folder.write("below/b", [b"1"])
    assert folder.names("below") == ["b"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(url: str) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise ValueError("no more")

    folder = Directory(url)
    folder.create()
    folder.write("a", [b"old"])
    with pytest.raises(ValueError, match="no more"):
        folder.write("a", pieces())
    assert folder.names() == ["a"]
    assert folder.read("a") == b"old"
    if os.path.isdir(folder.path):
        assert os.listdir(folder.path) == ["a"]


def test_a_reader_beside_a_writer_sees_one_version_in_full(url: str) -> None:
    folder, reader = Directory(url), Directory(url)
    folder.create()
    folder.write("a", [b"0" * 50_000])
    seen: list[bytes] = []
    stop = threading.Event()

    def keep_reading() -> None:
        while not stop.is_set():
            seen.append(reader.read("a"))

    thread = threading.Thread(target=keep_reading)
    thread.start()
    for i in range(1, 30):
        folder.write("a", [str(i % 10).encode() * 50_000 for _ in range(1 + i % 2)])
    stop.set()
    thread.join()
    assert len(seen) > 1
    assert all(len(set(data)) == 1 and len(data) in (50_000, 100_000) for data in seen)


def test_readers_of_one_file_do_not_move_each_others_place(url: str) -> None:
    folder = Directory(url)
    folder.create()
    folder.write("a", [b"0123456789"])
    with folder.open("a") as one, folder.open("a") as other:
        one.seek(2)
        other.seek(7)
        assert one.read(2) == b"23"
        assert other.read(2) == b"78"


def test_no_more_is_fetched_ahead_than_asked_for(s3_url: str) -> None:
    folder = Directory(s3_url)
    folder.write("a", [bytes(100_000)])
    with folder.open("a", readahead=1_000) as file:
        file.read(8)
        assert file.cache.total_requested_bytes <= 1_008  # type: ignore[attr-defined]


def write_file(url: str, name: str) -> None:
    Directory(url).write(name, [b"1"])


def finish(process: BaseProcess) -> None:
    process.join(30)
    assert process.exitcode == 0


def test_a_file_that_another_process_writes_or_deletes_is_noticed_at_once(shared_url: str, spawn: Spawn) -> None:
    folder = Directory(shared_url)
    folder.create()
    folder.write("a", [b"1"])
    assert folder.names() == ["a"]
    finish(spawn(write_file, shared_url, "b"))
    assert folder.names() == ["a", "b"]
    finish(spawn(delete_file, shared_url, "a"))
    assert folder.names() == ["b"]


def delete_file(url: str, name: str) -> None:
    Directory(url).delete(name)


def be_killed_while_writing(url: str, name: str, after: int) -> None:
    def pieces() -> Iterator[bytes]:
        for i in range(after + 1):
            if i == after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield b"x" * 10_000

    Directory(url).write(name, pieces())


@pytest.mark.parametrize("after", [0, 1, 50])
def test_a_write_cut_short_by_sigkill_is_invisible_and_swept_away(file_url: str, spawn: Spawn, after: int) -> None:
    folder = Directory(file_url)
    folder.write("below/a", [b"old"])
    process = spawn(be_killed_while_writing, file_url, "below/a", after)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert len(os.listdir(folder.file("below"))) == 2
    assert folder.names("below") == ["a"]
    assert folder.read("below/a") == b"old"
    folder.sweep("below")
    assert os.listdir(folder.file("below")) == ["a"]


def test_sweeping_a_folder_that_does_not_exist_does_nothing(url: str) -> None:
    Directory(url).sweep("below")
    assert Directory(url).names() == []


@given(pieces=st.lists(st.binary(max_size=100)))
def test_the_pieces_lie_in_the_file_one_after_the_other(pieces: list[bytes]) -> None:
    folder = Directory("memory://directory-pieces")
    folder.write("a", iter(pieces))
    assert folder.read("a") == b"".join(pieces)


def test_a_temporary_file_lies_beside_its_final_name(file_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def pieces() -> Iterator[bytes]:
        yield b"1"
        seen.extend(os.listdir(file_url))

    folder = Directory(file_url)
    folder.create()
    monkeypatch.setenv("TMPDIR", "/nowhere")
    folder.write("a", pieces())
    assert len(seen) == 1
    assert seen != ["a"]


def test_a_store_that_cannot_be_reached_raises_os_errors(s3_server: str) -> None:
    options = {
        "client_kwargs": {"endpoint_url": "http://127.0.0.1:1"},
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }
    folder = Directory("s3://bucket/a", options)
    folder.fs.retries = 1
    for attempt in (
        folder.names,
        folder.create,
        lambda: folder.read("b"),
        lambda: folder.open("b"),
        lambda: folder.write("b", [b"1"]),
        lambda: folder.delete("b"),
    ):
        with pytest.raises(OSError, match="EndpointConnectionError: Could not connect"):
            attempt()


class OfGoogle(Exception):
    """As ``gcsfs.retry.HttpError``."""

    __module__ = "gcsfs.retry"


class OfAzure(Exception):
    """As ``azure.core.exceptions.ServiceRequestError``."""

    __module__ = "azure.core.exceptions"


@pytest.mark.parametrize(
    "error",
    [
        botocore.exceptions.NoCredentialsError(),
        botocore.exceptions.ClientError({"Error": {"Code": "SlowDown"}}, "PutObject"),
        aiohttp.ServerDisconnectedError(),
        asyncio.TimeoutError("too long"),
        OfGoogle("503"),
        NotImplementedError("read-only"),
        type("Derived", (OfAzure,), {"__module__": "a.user"})("no route"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_clients_of_object_stores_raise_is_an_os_error(memory_url: str, error: Exception) -> None:
    folder = Directory(memory_url)
    with patch.object(type(folder.fs), "ls", side_effect=error), pytest.raises(OSError, match=re.escape(str(error))):
        folder.names()


@pytest.mark.parametrize("mistake", [TypeError("a"), AttributeError("a"), ValueError("a"), RuntimeError("a")])
def test_a_mistake_is_not_taken_for_an_error_of_the_store(memory_url: str, mistake: Exception) -> None:
    folder = Directory(memory_url)
    with patch.object(type(folder.fs), "ls", side_effect=mistake), pytest.raises(type(mistake)):
        folder.names()


def test_the_users_own_file_system_goes_on_to_remember_listings(s3_url: str) -> None:
    users = fsspec.filesystem("s3")
    folder = Directory(s3_url)
    folder.write("a", [b"1"])
    assert folder.fs is not users
    assert Directory(s3_url).fs is folder.fs, "a session of its own for each takes long to make"
    users.ls(s3_url)
    assert users.dircache
    assert not folder.fs.dircache


# -- large objects -----------------------------------------------------------------------------------------------------

PART = 5 << 20


def parts(count: int, size: int = 1 << 20) -> Iterator[memoryview]:
    for i in range(count):
        yield memoryview(bytes([i]) * size)


def uploads(folder: Directory) -> list[object]:
    """What was begun and neither completed nor aborted."""
    return list(folder.fs.call_s3("list_multipart_uploads", Bucket=folder.path).get("Uploads", ()))


def test_a_large_object_is_written_in_parts_and_seen_at_the_end(s3_url: str) -> None:
    folder, seen = Directory(s3_url, {"default_block_size": PART}), []

    def pieces() -> Iterator[memoryview]:
        for piece in parts(17):
            seen.append((len(folder.names()), len(uploads(folder))))
            yield piece

    folder.write("a", pieces())
    assert seen[0] == (0, 0)
    assert seen[-1] == (0, 1)
    assert not uploads(folder)
    assert folder.read("a") == b"".join(parts(17))


def test_no_more_than_a_part_is_held_in_memory(s3_url: str) -> None:
    folder = Directory(s3_url, {"default_block_size": PART})
    sent = []

    def take(self: object, method: str, *args: object, Body: bytes = b"", **kwargs: object) -> dict[str, str]:
        sent.append(len(Body))
        return {"UploadId": "1", "ETag": "1"}

    piece = memoryview(bytes(100 << 20))
    tracemalloc.start()
    with patch.object(s3fs.core.S3File, "_call_s3", take):
        folder.write("a", [piece, *parts(9)])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(sent) == 109 << 20
    assert most < 48 << 20


@pytest.mark.parametrize("count", [0, 3, 17])
def test_a_write_in_parts_that_fails_leaves_the_old_object_and_no_parts(s3_url: str, count: int) -> None:
    folder = Directory(s3_url, {"default_block_size": PART})
    folder.write("a", [b"old"])

    def pieces() -> Iterator[memoryview]:
        yield from parts(count)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        folder.write("a", pieces())
    gc.collect()
    assert folder.read("a") == b"old"
    assert folder.names() == ["a"]
    assert not uploads(folder)


def test_a_part_that_cannot_be_sent_fails_the_write(s3_url: str) -> None:
    folder = Directory(s3_url, {"default_block_size": PART})
    call = s3fs.core.S3File._call_s3

    def fail_at_the_second(self: object, method: str, *args: object, **kwargs: object) -> object:
        if method == "upload_part" and kwargs["PartNumber"] == 2:
            raise botocore.exceptions.ReadTimeoutError(endpoint_url="there")
        return call(self, method, *args, **kwargs)

    with (
        patch.object(s3fs.core.S3File, "_call_s3", fail_at_the_second),
        pytest.raises(OSError, match="Read timeout"),
    ):
        folder.write("a", parts(17))
    gc.collect()
    assert folder.names() == []
    assert not uploads(folder)


def writes() -> int:
    """Calls of the system to write, by this process so far."""
    return int(Path("/proc/self/io").read_text().split("syscw: ")[1].split()[0])


def test_small_pieces_are_gathered_and_large_ones_are_not_copied(file_url: str) -> None:
    folder = Directory(file_url)
    folder.create()
    large = memoryview(bytes(8 << 20))
    pieces = [large, *(memoryview(bytes([i % 251]) * 1_000) for i in range(10_000)), large]
    before = writes()
    tracemalloc.start()
    folder.write("a", pieces)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 20
    assert writes() - before < 200
    assert folder.read("a") == b"".join(pieces)
