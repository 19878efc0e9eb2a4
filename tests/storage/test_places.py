"""Places of files: their union, copies from one to the next, and memory that is written back."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_blocks import save

from lightning_scar.storage import delta_file
from lightning_scar.storage.delta import Delta
from lightning_scar.storage.directory import Directory, Tier
from lightning_scar.storage.head import Version
from lightning_scar.storage.host_memory import HostMemory
from lightning_scar.storage.places import Copies, Places
from lightning_scar.storage.rank_store import RankStore
from lightning_scar.storage.write_back import WriteBack, bring_in


def delta(number: int, rank: int = 0) -> str:
    return f"rank-{rank:04d}/delta-00001-{number:08d}.safetensors"


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(Directory(tmp_path / "storage"), Directory(tmp_path / "memory"))


def test_the_nearest_place_that_has_a_file_serves(places: Places) -> None:
    assert places.memory is not None
    places.write(delta(0), [b"in memory"])
    places.storage.write(delta(0), [b"in storage"])
    places.storage.write(delta(1), [b"in storage only"])
    assert places.names("rank-0000") == [delta(i).partition("/")[2] for i in (0, 1)]
    assert (places.read(delta(0)), places.read(delta(1))) == (b"in memory", b"in storage only")
    assert (places.tier(delta(0)), places.tier(delta(1))) == (Tier.MEMORY, Tier.STORAGE)
    assert places.further(delta(0)) is places.storage
    assert places.further(delta(1)) is None
    places.delete(delta(0))
    assert places.read(delta(0)) == b"in storage", "it follows when storage is brought up to date"


def test_what_memory_does_not_take_goes_to_storage(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(name: str, pieces: Iterable[bytes]) -> None:
        next(iter(pieces))
        raise OSError("no space left")

    assert places.memory is not None
    with monkeypatch.context() as patch:
        patch.setattr(places.memory, "write", full)
        places.write(delta(0), [b"12", b"34"])
    assert places.storage.read(delta(0)) == b"1234"
    assert places.is_short
    places.write(delta(1), [b"5"])
    assert not places.is_short
    assert places.trouble is not None


# -- copies ------------------------------------------------------------------------------------------------------------


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(0, 9)),
            st.tuples(st.just("delete"), st.integers(0, 9)),
            st.tuples(st.just("update"), st.just(0)),
        ),
        max_size=30,
    )
)
def test_a_place_has_what_is_wanted_and_never_less_than_before_all_of_it_is_there(
    steps: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("places")
    near, far = Directory(folder / "near"), Directory(folder / "far")
    wanted: set[str] = set()
    copies = Copies(near, far, ["rank-0000"], wanted.copy)
    for what, number in steps:
        if what == "write":
            near.write(delta(number), [b"%d" % number])
            wanted.add(delta(number))
        elif what == "delete":
            near.delete(delta(number))
            wanted.discard(delta(number))
        else:
            assert copies.update()
            assert {f"rank-0000/{name}" for name in far.names("rank-0000")} == wanted == copies.there
            assert all(far.read(name) == near.read(name) for name in wanted)


def test_nothing_is_deleted_before_what_replaces_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = Directory(tmp_path / "near"), Directory(tmp_path / "far")
    wanted = {delta(0)}
    near.write(delta(0), [b"0"])
    copies = Copies(near, far, ["rank-0000"], wanted.copy)
    copies.update()
    near.delete(delta(0))
    wanted ^= {delta(0), delta(1), delta(2)}
    near.write(delta(1), [b"1"])
    assert not copies.update(), "the other one has vanished"
    assert far.names("rank-0000") == [delta(i).partition("/")[2] for i in (0, 1)]
    near.write(delta(2), [b"2"])
    with monkeypatch.context() as patch:
        patch.setattr(far, "write", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            copies.update()
    assert far.read(delta(0)) == b"0"
    assert copies.update()
    assert far.names("rank-0000") == [delta(i).partition("/")[2] for i in (1, 2)]


def test_what_was_there_before_and_is_nobodys_is_left_alone(tmp_path: Path) -> None:
    """A damaged delta, or one of a newer version, is not known to the rank."""
    near, far = Directory(tmp_path / "near"), Directory(tmp_path / "far")
    far.write(delta(7), [b"damaged"])
    far.write("rank-0000/address.json", [b"{}"])
    Copies(near, far, ["rank-0000"], set, only_own=True).update()
    assert far.names("rank-0000") == ["address.json", delta(7).partition("/")[2]]
    Copies(near, far, ["rank-0000"], set).update()
    assert far.names("rank-0000") == ["address.json"]


def test_a_file_that_is_merged_away_meanwhile_is_not_missed(tmp_path: Path) -> None:
    near, far = Directory(tmp_path / "near"), Directory(tmp_path / "far")
    wanted = {delta(0), delta(1)}
    near.write(delta(0), [b"0"])
    near.write(delta(1), [b"1"])
    write = far.write

    def merging(name: str, pieces: Iterable[bytes | memoryview]) -> None:
        write(name, pieces)
        if delta(1) in wanted:
            near.delete(delta(1))
            near.write(delta(2), [b"2"])
            wanted.symmetric_difference_update({delta(1), delta(2)})

    far.write = merging  # type: ignore[method-assign]
    assert Copies(near, far, ["rank-0000"], wanted.copy).update()
    assert far.names("rank-0000") == [delta(i).partition("/")[2] for i in (0, 2)]


# -- memory that is written back ---------------------------------------------------------------------------------------


def test_room_is_made_of_what_storage_has_the_oldest_first(host: Path, tmp_path: Path) -> None:
    storage = Directory(tmp_path / "scar")
    memory = HostMemory(storage, "a run")
    places, names = Places(storage, memory), [delta(i) for i in range(5)]
    for name in names:
        places.write(name, [bytes(100)])
    write_back = WriteBack(places, memory, ["rank-0000"], lambda: names, every=8)
    write_back.make_room(100, state_bytes=100)
    assert len(memory.names("rank-0000")) == 5, "storage has nothing yet"
    write_back.finish()
    write_back.make_room(100, state_bytes=100)
    assert [f"rank-0000/{name}" for name in memory.names("rank-0000")] == names[3:]
    assert [places.read(name) for name in names] == [bytes(100)] * 5
    memory.limit = 150
    write_back.make_room(100, state_bytes=100)
    assert memory.names("rank-0000") == []
    write_back.leave(remove=True)
    assert not list(host.glob("*/*"))


def test_ranks_of_a_host_share_what_they_bring_to_storage(host: Path, tmp_path: Path) -> None:
    storage = Directory(tmp_path / "scar")
    memory = HostMemory(storage, "a run")
    names = {delta(i, rank) for i in range(20) for rank in range(3)}
    for name in names:
        memory.write(name, [name.encode()])
    storage.write(delta(0), [b"it is there already"])
    found = [bring_in(Places(storage), memory, share, 4) for share in range(4)]
    assert sum(map(len, found)) == 59
    assert set().union(*found) == names - {delta(0)}
    assert all(map(len, found))
    assert storage.read(delta(3, 2)) == delta(3, 2).encode()
    memory.leave()


def test_what_is_written_beside_an_update_is_not_taken_for_unwanted(
    host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save finds no room in memory while a thread deletes in storage what nobody wants."""
    store = RankStore(tmp_path / "scar")
    store.directory.memory = HostMemory(store.directory.storage, "a run", limit=100)
    store.open(every=1000)
    parse = delta_file._parse

    def updating(*arguments: Any) -> Delta:
        if store.write_back is not None:
            store.write_back.finish()
        return parse(*arguments)

    monkeypatch.setattr(delta_file, "_parse", updating)
    for sequence in range(30):
        save(store, [f"b{sequence % 5}"], Version(1, sequence, sequence), state_bytes=5 * 64)
        assert {f"rank-0000/{name}" for name in store.directory.names("rank-0000")} >= store.own_names()
    store.leave_memory(is_stored=True)
