"""Several ranks that write to one directory: each in its own folder, with an eye on the others'."""

import itertools
import random
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_blocks import block as block_data
from toy_blocks import check, content, head, newest, read, save

from lightning_scar.storage import rank_store
from lightning_scar.storage import store as store_module
from lightning_scar.storage.compaction import MAX_FILES, STATES
from lightning_scar.storage.delta import DamagedError
from lightning_scar.storage.delta_file import read_delta
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.head import Version
from lightning_scar.storage.index import newest_lineage
from lightning_scar.storage.rank_store import RankStore
from lightning_scar.storage.store import DeltaStore, rank_folder, rank_of

COUNTER = itertools.count()


def opened(url: str, n: int) -> list[RankStore]:
    stores = [RankStore(url, rank=rank, world_size=n) for rank in range(n)]
    for store in stores:
        store.refresh()
    return stores


def commit(store: RankStore, keys: Any, sequence: int, incarnation: int = 1, size: int = 64, **changes: Any) -> int:
    options = {"rank": store.rank, "world_size": store.world_size, **changes}
    return save(store, keys, Version(incarnation, sequence, 10 * sequence), size, **options)


def files(url: str) -> dict[str, int]:
    store = DeltaStore(url)
    return {name: int(store.directory.fs.size(store.directory.file(name))) for name in names(store)}


def names(store: DeltaStore) -> list[str]:
    return [name for folder in store.folders() for name in store._names_in(folder)]


def sequences(store: DeltaStore, key: str) -> list[int]:
    return [at.block.version.sequence for at in store.index.versions(key)]


# -- look_around -------------------------------------------------------------------------------------------------------


def test_a_rank_sees_what_the_others_have_written(url: str) -> None:
    first, second = opened(url, 2)
    commit(first, "ab", 0)
    commit(second, "cd", 0)
    assert newest(first) == {key: Version(1, 0, 0) for key in "ab"}
    first.look_around(others=True)
    assert newest(first) == {key: Version(1, 0, 0) for key in "abcd"}
    assert sorted(first.index.heads) == [0, 1]
    commit(second, "c", 1)
    first.look_around()
    assert sequences(first, "c") == [0]
    first.look_around(others=True)
    assert sequences(first, "c") == [1, 0]


def test_a_rank_forgets_what_another_has_deleted_or_merged(memory_url: str) -> None:
    first, second = opened(memory_url, 2)
    commit(first, "a", 0)
    for i in range(130):
        commit(second, [f"b{i}"], i, size=1_000)
        if i % 9 == 0:
            first.look_around(others=True)
    first.look_around(others=True)
    assert any("merged" in name for name in files(memory_url))
    assert {delta.name for delta in first.deltas} == set(files(memory_url))
    assert newest(first) == newest(second) | {"a": Version(1, 0, 0)} == check(DeltaStore(memory_url))
    for key in [f"b{i}" for i in range(130)]:
        at = first.index.versions(key)[0]
        assert read(first, at) == content(key, at.block.version, 1_000)


def test_what_cannot_be_read_now_is_taken_in_later(memory_url: str) -> None:
    first, second = opened(memory_url, 2)
    commit(first, "a", 0)
    commit(second, "c", 0)
    commit(second, "d", 1)
    for error in (DamagedError("half of it"), FileNotFoundError("gone again"), OSError("the network")):
        with patch.object(store_module, "read_delta", side_effect=error):
            first.look_around(others=True)
        assert set(newest(first)) == {"a"}

    def only_the_second(directory: Directory, name: str) -> Any:
        if name.endswith("-00000000.safetensors"):
            raise OSError("the network")
        return read_delta(directory, name)

    with patch.object(store_module, "read_delta", side_effect=only_the_second):
        first.look_around(others=True)
    assert set(newest(first)) == {"a", "d"}
    first.look_around(others=True)
    assert set(newest(first)) == {"a", "c", "d"}


def test_a_listing_that_fails_changes_nothing(memory_url: str) -> None:
    first, second = opened(memory_url, 2)
    commit(first, "a", 0)
    commit(second, "c", 0)
    first.look_around(others=True)
    with patch.object(Directory, "names", side_effect=OSError("the network")):
        first.look_around(others=True)
    assert set(newest(first)) == {"a", "c"}


def test_a_file_of_another_training_is_seen_and_does_not_count(memory_url: str) -> None:
    first, second = opened(memory_url, 2)
    commit(first, "a", 0, incarnation=2, lineage=(2,))
    commit(second, "a", 5, incarnation=1, lineage=(1,))
    first.look_around(others=True)
    assert newest(first) == {"a": Version(2, 0, 0)}


def test_alone_nobody_looks_around(memory_url: str) -> None:
    alone = RankStore(memory_url)
    commit(alone, "a", 0)
    with patch.object(Directory, "names", side_effect=AssertionError):
        alone.look_around(others=True)


def listed(stores: list[RankStore], sequences: range, incarnation: int = 1, **changes: Any) -> list[list[int]]:
    """Which folders each save of the first rank lists, while all of them save."""
    seen: list[list[int]] = []
    names = Directory.names

    def watched(self: Directory, folder: str = "") -> list[str]:
        if is_first and folder:
            seen[-1].append(rank_of(folder))
        return names(self, folder)

    with patch.object(Directory, "names", watched):
        for sequence in sequences:
            for store in reversed(stores):
                if is_first := store.rank == 0:
                    seen.append([])
                commit(store, [f"b{store.rank}", f"skeleton-{store.rank}"], sequence, incarnation, **changes)
    return seen


def test_others_are_looked_at_until_all_have_saved_and_then_no_more(memory_url: str) -> None:
    stores = opened(memory_url, 3)
    assert listed(stores, range(30)) == [[1, 2], *[[]] * 29]
    assert stores[0].is_whole
    assert sorted(stores[0].index.heads) == [0, 1, 2]


def test_who_goes_on_as_before_looks_at_others_a_few_times(memory_url: str) -> None:
    listed(opened(memory_url, 3), range(3))
    seen = listed(opened(memory_url, 3), range(70), incarnation=2, state_bytes=1000)
    assert seen[0] == [1, 2]
    assert sum(map(bool, seen)) <= 2, "all that was there has been saved anew"


def test_who_holds_what_others_own_by_now_looks_ever_more_rarely(memory_url: str) -> None:
    commit(opened(memory_url, 1)[0], [f"frozen{i}" for i in range(9)], 0)
    seen = listed(opened(memory_url, 2), range(70), incarnation=2)
    assert [i for i, folders in enumerate(seen, start=1) if folders] == [1, 2, 4, 8, 16, 32, 64]


def test_who_holds_too_much_looks_whether_others_have_saved_it_by_now(memory_url: str) -> None:
    keys = [f"b{i}" for i in range(8)]
    for sequence in range(2):
        commit(opened(memory_url, 1)[0], keys, sequence, size=10_000)
    first, second = opened(memory_url, 2)
    for sequence in range(20):
        commit(second, keys[4:], sequence, incarnation=2, size=10_000, state_bytes=45_000)
        commit(first, [keys[sequence % 4]], sequence, incarnation=2, size=10_000, state_bytes=45_000)
        own = sum(delta.nbytes for delta in first.own_deltas)
        assert own <= STATES * 45_000 + 80_000 * (sequence < 2)


def test_is_whole_is_not_asked_again_once_it_is_known(memory_url: str) -> None:
    stores = opened(memory_url, 2)
    listed(stores, range(2))
    assert stores[0].is_whole
    with patch.object(rank_store, "newest_lineage", side_effect=AssertionError):
        listed(stores, range(2, 9))
        assert stores[0].is_whole


# -- folders of ranks that are no more ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(4, 2), (5, 3), (3, 1), (7, 2)])
def test_folders_of_ranks_that_are_no_more_are_adopted_and_emptied(n: int, m: int, memory_url: str) -> None:
    keys = [f"b{i}" for i in range(n)]
    for rank, store in enumerate(opened(memory_url, n)):
        commit(store, [keys[rank]], 0)
    deleted: list[tuple[int, int]] = []
    delete = Directory.delete

    def watched(self: Directory, name: str) -> None:
        deleted.append((writer.rank, rank_of(name)))
        delete(self, name)

    stores = opened(memory_url, m)
    with patch.object(Directory, "delete", watched):
        for writer, sequence in [*itertools.product(stores, range(3)), *((store, 3) for store in stores)]:
            commit(writer, keys[writer.rank :: m], sequence, incarnation=2)
            assert set(check(DeltaStore(memory_url))) == set(keys)
    left = {rank_of(name) for name in files(memory_url)}
    assert left == set(range(m)), "an old folder is not emptied"
    assert all(folder % m == by for by, folder in deleted)
    assert {folder for _, folder in deleted} >= set(range(m, n))


def test_a_folder_of_a_living_rank_is_left_alone_whatever_lies_there(memory_url: str) -> None:
    first, second = opened(memory_url, 2)
    commit(second, "a", 0)
    for sequence in range(1, 9):
        commit(first, "a", sequence)
    assert [rank_of(name) for name in files(memory_url)].count(1) == 1
    assert sequences(first, "a") == [8, 7]


def test_leftovers_of_a_crash_are_swept_where_nobody_else_writes(file_url: str) -> None:
    for rank, store in enumerate(opened(file_url, 4)):
        commit(store, [f"b{rank}"], 0)
    folder = DeltaStore(file_url).directory
    for rank in range(4):
        with open(f"{folder.path}/{rank_folder(rank)}/.delta.123.tmp", "wb") as file:
            file.write(b"half")

    def left() -> set[int]:
        found = folder.fs.glob(f"{folder.path}/*/.*.tmp")
        return {rank_of(str(path).removeprefix(f"{folder.path}/")) for path in found}

    first, second = opened(file_url, 2)
    first.sweep()
    assert left() == {1, 3}
    second.sweep()
    assert left() == set()


def test_nothing_of_an_old_rank_is_deleted_before_its_successor_is_durable(memory_url: str) -> None:
    """Block ``a`` lies with rank 2, is rank 0's from now on, and rank 0 is slow: rank 0 % 2 looks after its folder."""
    for rank, store in enumerate(opened(memory_url, 3)):
        commit(store, "cba"[rank], 0)
    first, second = opened(memory_url, 2)
    for sequence in range(5):
        commit(second, "b", sequence, incarnation=2)
        first.look_around(others=True)
    assert set(check(DeltaStore(memory_url))) == set("abc")
    commit(first, "a", 0, incarnation=2)
    assert sequences(first, "a") == [0, 0], "the old one is there to fall back to"
    assert any(rank_of(name) == 2 for name in files(memory_url))


# -- many saves by many ranks ------------------------------------------------------------------------------------------


class Truth:
    """Ranks that save blocks of many sizes; who owns what changes with every start."""

    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self.random = random.Random(seed)
        self.sizes = {f"b{i}": self.random.randint(3_000, 9_000) for i in range(48)}
        self.saved: dict[str, list[Version]] = {key: [] for key in self.sizes}
        self.incarnation = 0
        self.stores: list[RankStore] = []

    def start(self, n: int) -> None:
        self.incarnation += 1
        self.stores = opened(self.url, n)
        keys = sorted(self.sizes)
        self.random.shuffle(keys)
        self.owned = [keys[rank::n] for rank in range(n)]
        self.sequence = 0

    def save(self, rank: int, keys: list[str]) -> int:
        store = self.stores[rank]
        version = Version(self.incarnation, self.sequence, self.sequence)
        self.sequence += 1
        owned_bytes = sum(self.sizes[key] for key in self.owned[rank])
        said = head(version, rank=rank, world_size=len(self.stores), state_bytes=owned_bytes, whole=store.is_whole)
        written = store.commit(said, [block_data(key, version, self.sizes[key]) for key in keys])
        for key in keys:
            self.saved[key].append(version)
        return written

    def assert_readable(self) -> None:
        reader = DeltaStore(self.url)
        reader.refresh()
        for key, versions in self.saved.items():
            if versions:
                at = reader.index.versions(key)
                assert at[0].block.version == versions[-1], key
                assert len(at) >= min(2, len(versions)), f"nothing to fall back to for {key}"
                for located in at:
                    assert read(reader, located) == content(key, located.block.version, self.sizes[key])

    def assert_bounded(self) -> None:
        state, n = sum(self.sizes.values()), len(self.stores)
        found = files(self.url)
        assert {rank_of(name) for name in found} <= set(range(n)), "old folders are not emptied"
        for rank in range(n):
            own = [size for name, size in found.items() if rank_of(name) == rank]
            assert len(own) <= MAX_FILES
        save_bytes = 4 * 10_000 * n
        assert sum(found.values()) <= STATES * state + save_bytes


@pytest.mark.parametrize("starts", [(2,), (3, 1), (1, 3), (4, 2, 3)])
def test_many_ranks_stay_within_the_bounds_and_lose_nothing(starts: tuple[int, ...], memory_url: str) -> None:
    truth = Truth(memory_url, seed=len(starts))
    for n in starts:
        truth.start(n)
        for rank in range(n):
            truth.save(rank, truth.owned[rank] if truth.incarnation == 1 else truth.owned[rank][:2])
        for i in range(40 * n):
            rank = truth.random.randrange(n)
            own = truth.owned[rank]
            # In turn, so that in the end everything is saved anew, and by chance besides.
            truth.save(rank, sorted({own[i // n % len(own)], truth.random.choice(own)}))
            if i % 15 == 0:
                truth.assert_readable()
        for _ in range(2):
            for rank in range(n):
                truth.save(rank, truth.owned[rank])
        for rank in range(n):
            truth.save(rank, truth.owned[rank][:1])
        truth.assert_readable()
        truth.assert_bounded()


@given(
    starts=st.lists(st.tuples(st.integers(1, 3), st.lists(st.integers(0, 2), max_size=8)), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_in_any_order_of_saves_nothing_is_lost(memory_url: str, starts: list[tuple[int, list[int]]], seed: int) -> None:
    truth = Truth(f"{memory_url}/{next(COUNTER)}", seed)
    truth.sizes = dict.fromkeys(list(truth.sizes)[:9], 500)
    truth.saved = {key: [] for key in truth.sizes}
    for n, turns in starts:
        truth.start(n)
        for rank in range(n) if truth.incarnation == 1 else ():
            truth.save(rank, truth.owned[rank])
        for turn in turns:
            rank = turn % n
            own = truth.owned[rank]
            truth.save(rank, truth.random.sample(own, truth.random.randint(1, len(own))))
            truth.assert_readable()


# -- which training counts ---------------------------------------------------------------------------------------------


def lineage(url: str) -> tuple[int, ...]:
    store = DeltaStore(url)
    store.refresh()
    assert store.index.lineage == newest_lineage(store.deltas)
    return store.index.lineage


def fresh(stores: list[RankStore], keys: str, incarnation: int, ranks: Iterator[int]) -> None:
    for rank in ranks:
        store = stores[rank]
        store.look_around(others=True)
        sequence = sum(delta.head.incarnation == incarnation and delta.head.rank == rank for delta in store.deltas)
        whole = store.is_whole and store.index.lineage == (incarnation,)
        commit(store, keys[rank], sequence, incarnation, lineage=(incarnation,), whole=whole)


def test_a_fresh_training_counts_when_all_ranks_have_saved_and_the_old_one_is_kept_till_then(memory_url: str) -> None:
    fresh(opened(memory_url, 2), "ab", 1, iter([0, 1]))
    assert lineage(memory_url) == (1,)
    stores = opened(memory_url, 2)
    fresh(stores, "ab", 2, iter([0, 0, 0]))
    assert lineage(memory_url) == (1,)
    assert set(check(DeltaStore(memory_url)).values()) == {Version(1, 0, 0)}
    assert not stores[0].is_whole
    fresh(stores, "ab", 2, iter([1]))
    assert lineage(memory_url) == (2,)
    assert check(DeltaStore(memory_url)) == {"a": Version(2, 2, 20), "b": Version(2, 0, 0)}
    fresh(stores, "ab", 2, iter([0, 1]))
    assert stores[0].is_whole
    assert stores[1].is_whole
    assert all("00002" in name for name in files(memory_url)), "the old training's files are still there"


def test_a_training_goes_on_to_count_when_the_folder_of_a_rank_is_lost(memory_url: str) -> None:
    stores = opened(memory_url, 3)
    fresh(stores, "abc", 1, iter([0, 1, 2, 0, 1, 2]))
    for lost in range(3):
        directory = stores[0].directory
        names = [f"{rank_folder(lost)}/{name}" for name in directory.names(rank_folder(lost))]
        kept = {name: directory.read(name) for name in names}
        for name in kept:
            directory.delete(name)
        assert lineage(memory_url) == (1,)
        assert set(check(DeltaStore(memory_url))) == set("abc") - {"abc"[lost]}
        for name, data in kept.items():
            directory.write(name, [data])


def test_a_training_that_never_became_whole_is_cleared_away_by_the_one_that_does(memory_url: str) -> None:
    fresh(opened(memory_url, 2), "ab", 1, iter([0, 1]))
    fresh(opened(memory_url, 2), "ab", 2, iter([0]))
    stores = opened(memory_url, 2)
    assert stores[0].index.lineage == (1,)
    for sequence in range(2):
        for store, key in zip(stores, "ab", strict=True):
            commit(store, key, sequence, incarnation=3, lineage=(1, 3))
    assert lineage(memory_url) == (1, 3)
    assert not any("00002" in name for name in files(memory_url))


@given(orders=st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=4))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_two_trainings_never_mix(memory_url: str, orders: list[list[int]]) -> None:
    url, counting = f"{memory_url}/{next(COUNTER)}", 0
    for incarnation, order in enumerate(orders, start=1):
        stores = opened(url, 3)
        for done in range(1, len(order) + 1):
            fresh(stores, "abc", incarnation, iter([order[done - 1]]))
            if set(order[:done]) == {0, 1, 2}:
                counting = incarnation
            assert lineage(url) == ((counting,) if counting else ())
            found = check(DeltaStore(url))
            assert {version.incarnation for version in found.values()} == ({counting} if counting else set())
            assert set(found) == (set("abc") if counting else set())
