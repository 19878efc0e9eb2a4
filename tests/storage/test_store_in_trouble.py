"""A store beside its readers, under SIGKILL, and on a full disk."""

import errno
import os
import random
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from toy_blocks import Spawn, at_least, check, newest, save

from lightning_scar.storage.head import Version
from lightning_scar.storage.rank_store import RankStore
from lightning_scar.storage.store import DeltaStore

KEYS = [f"b{i}" for i in range(12)]
SIZE = 5_000
STATE = {"size": SIZE, "state_bytes": len(KEYS) * SIZE}


def save_some(store: RankStore, version: Version, generator: random.Random) -> None:
    """Saves everything first and a random part later, so that merges are due every few saves."""
    first = not list(store.index.keys())
    save(store, KEYS if first else generator.sample(KEYS, generator.randint(1, 5)), version, **STATE)


def resumed(url: str) -> tuple[RankStore, int]:
    """A store that goes on from what is there, and its incarnation."""
    store = RankStore(url)
    store.refresh()
    store.directory.sweep(store.folder)
    return store, 1 + max((delta.head.incarnation for delta in store.deltas), default=0)


def merges(store: RankStore) -> bool:
    return any("merged" in delta.name for delta in store.deltas)


# -- readers beside the writer ---------------------------------------------------------------------------------------


def keep_checking(url: str, stop: str) -> None:
    """Reads all the time; a process of its own."""
    store, seen = DeltaStore(url), {}
    while not os.path.exists(stop):
        for reader in (store, DeltaStore(url)):
            found = check(reader)
            assert set(found) == set(KEYS)
            assert at_least(found, seen)
            seen = found


def test_readers_beside_a_writer_always_see_a_complete_checkpoint(url: str) -> None:
    generator = random.Random(0)
    writer = RankStore(url)
    save_some(writer, Version(1, 0, 0), generator)
    acknowledged = newest(writer)
    failures: list[BaseException] = []
    rounds = [0, 0]
    stop = threading.Event()

    def keep_reading(number: int) -> None:
        reader = DeltaStore(url)
        try:
            while not stop.is_set():
                before = acknowledged
                found = check(reader)
                assert set(found) == set(KEYS)
                assert at_least(found, before)
                rounds[number] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=keep_reading, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    merged = False
    for i in range(1, 25 if url.startswith("s3") else 120):
        save_some(writer, Version(1, i, i), generator)
        acknowledged = newest(writer)
        merged |= merges(writer)
    stop.set()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert merged
    assert min(rounds) > 0


def test_a_reader_in_another_process_always_sees_a_complete_checkpoint(
    shared_url: str, tmp_path: Path, spawn: Spawn
) -> None:
    generator = random.Random(0)
    writer = RankStore(shared_url)
    save_some(writer, Version(1, 0, 0), generator)
    stop = tmp_path / "stop"
    reader = spawn(keep_checking, shared_url, str(stop))
    for i in range(1, 25 if shared_url.startswith("s3") else 120):
        save_some(writer, Version(1, i, i), generator)
        assert reader.exitcode is None
    stop.touch()
    reader.join(30)
    assert reader.exitcode == 0


# -- SIGKILL ---------------------------------------------------------------------------------------------------------


def keep_saving(url: str, seed: int, pipe: Connection) -> None:
    """Saves until it is killed, and says after each save what is durable."""
    store, incarnation = resumed(url)
    generator = random.Random(seed)
    sequence = 0
    while True:
        save_some(store, Version(incarnation, sequence, sequence), generator)
        sequence += 1
        pipe.send(newest(store))


def test_sigkill_at_a_random_moment_loses_nothing_that_was_saved(file_url: str, spawn: Spawn) -> None:
    generator = random.Random(time.time_ns())
    for seed in range(12):
        ours, theirs = Pipe(duplex=False)
        process = spawn(keep_saving, file_url, seed, theirs)
        theirs.close()
        acknowledged = ours.recv()
        time.sleep(generator.uniform(0, 0.1))
        process.kill()
        process.join()
        with suppress(EOFError):
            while True:
                acknowledged = ours.recv()
        reader = RankStore(file_url)
        found = check(reader)
        assert set(found) == set(KEYS)
        assert at_least(found, acknowledged)
        assert reader.verify() == []
        assert not [name for name in reader.directory.names(reader.folder) if not name.endswith(".safetensors")]
    store, _ = resumed(file_url)
    assert sorted(os.listdir(Path(file_url) / store.folder)) == [delta.name.split("/")[1] for delta in store.deltas]


# -- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 400 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_save_that_finds_the_disk_full_changes_nothing(small_disk: Path) -> None:
    store = RankStore(small_disk)
    save(store, KEYS, Version(1, 0, 0), **STATE)
    before = os.listdir(small_disk / store.folder)
    filler = small_disk / "filler"
    with suppress(OSError):
        filler.write_bytes(b"x" * 400_000)
    with pytest.raises(OSError, match="No space left"):
        save(store, KEYS, Version(1, 1, 1), **STATE)
    assert os.listdir(small_disk / store.folder) == before
    assert set(check(DeltaStore(small_disk)).values()) == set(newest(store).values()) == {Version(1, 0, 0)}
    filler.unlink()
    save(store, KEYS, Version(1, 2, 2), **STATE)
    assert set(check(DeltaStore(small_disk)).values()) == {Version(1, 2, 2)}


def test_saves_and_merges_on_a_disk_that_fills_up_now_and_then_lose_nothing(small_disk: Path) -> None:
    generator = random.Random(0)
    store = RankStore(small_disk)
    save_some(store, Version(1, 0, 0), generator)
    acknowledged, failures = newest(store), 0
    for i in range(1, 150):
        free = os.statvfs(small_disk)
        room = generator.randint(0, 40_000)
        (small_disk / "filler").write_bytes(b"x" * max(0, free.f_bavail * free.f_frsize - room))
        try:
            save_some(store, Version(1, i, i), generator)
            acknowledged = newest(store)
        except OSError as error:
            failures += error.errno == errno.ENOSPC
        (small_disk / "filler").unlink()
        found = check(DeltaStore(small_disk))
        assert set(found) == set(KEYS)
        assert at_least(found, acknowledged)
        assert all(name.endswith(".safetensors") for name in os.listdir(small_disk / store.folder))
    assert 10 < failures < 140


def save_too_much(url: str) -> None:
    """Meets a limit on the size of files, half-way through a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * SIZE, 3 * SIZE))
    store, _ = resumed(url)
    with pytest.raises(OSError, match="File too large"):
        save(store, KEYS, Version(1, 1, 1), **STATE)
    save(store, KEYS[:1], Version(1, 2, 2), **STATE)


def test_a_write_that_fails_half_way_leaves_no_trace(file_url: str, spawn: Spawn) -> None:
    store = RankStore(file_url)
    save(store, KEYS, Version(1, 0, 0), **STATE)
    process = spawn(save_too_much, file_url)
    process.join(30)
    assert process.exitcode == 0
    found = check(DeltaStore(file_url))
    assert found.pop(KEYS[0]) == Version(1, 2, 2)
    assert set(found.values()) == {Version(1, 0, 0)}
    assert len(os.listdir(Path(file_url) / store.folder)) == 2
