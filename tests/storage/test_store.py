"""What the deltas of a directory add up to."""

import itertools
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_blocks import block, check, content, head, newest, read, refresh, rows, save

from lightning_scar.storage.compaction import MAX_FILES, STATES
from lightning_scar.storage.delta import NewerFormatError, block_key
from lightning_scar.storage.delta_file import encode
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.head import Version
from lightning_scar.storage.index import Located
from lightning_scar.storage.rank_store import RankStore
from lightning_scar.storage.reading import Reading, fill
from lightning_scar.storage.store import DeltaStore

COUNTER = itertools.count()


def at(sequence: int, incarnation: int = 1) -> Version:
    return Version(incarnation, sequence, 10 * sequence)


def files(store: RankStore) -> dict[str, int]:
    at = store.directory
    return {name: int(at.fs.size(at.file(f"{store.folder}/{name}"))) for name in at.names(store.folder)}


def overwrite(store: RankStore, name: str, position: int, mask: int = 255) -> None:
    """Damages a file behind the store's back."""
    data = bytearray(store.directory.read(name))
    data[position] ^= mask
    store.directory.write(name, [bytes(data)])


def damage(store: RankStore, key: str) -> str:
    """Flips a byte of the newest version of a block, and returns the path of the file."""
    located = store.index.versions(key)[0]
    overwrite(store, located.delta.name, located.block.slots["param"].start)
    return store.directory.file(located.delta.name)


# -- the truth to compare a store with -------------------------------------------------------------------------------


@dataclass
class Model:
    """What a store should hold, in memory."""

    sizes: dict[str, int]
    history: dict[str, list[Version]] = field(default_factory=dict)
    consistent: Version | None = None
    incarnation: int = 1
    lineage: tuple[int, ...] = (1,)
    sequence: int = 0

    @property
    def state_bytes(self) -> int:
        return sum(self.sizes.values())

    def commit(self, store: RankStore, keys: set[str], full: bool = False) -> int:
        version = Version(self.incarnation, self.sequence, 7 * self.sequence)
        self.sequence += 1
        consistent = version if full else self.consistent
        said = head(version, lineage=self.lineage, consistent=consistent, state_bytes=self.state_bytes)
        blocks = [block(key, version, self.sizes[key]) for key in sorted(keys)]
        nbytes = encode(said, blocks).nbytes
        assert store.commit(said, blocks) >= nbytes
        self.consistent = consistent
        for key in keys:
            self.history.setdefault(key, []).append(version)
        return nbytes

    def resume(self) -> None:
        self.incarnation += 1
        self.lineage = (*self.lineage, self.incarnation)
        self.sequence = 0

    def start_afresh(self) -> None:
        self.incarnation += 1
        self.lineage = (self.incarnation,)
        self.sequence = 0
        self.history, self.consistent = {}, None

    def assert_holds(self, store: RankStore, url: str, save_bytes: int) -> None:
        reader = DeltaStore(url)
        reader.refresh()
        assert not reader.damaged
        assert reader.index.lineage == self.lineage
        assert reader.index.consistent == (self.consistent.mark if self.consistent else None)
        for found in (reader, store):
            assert set(found.index.keys()) == set(self.history)
            for key, history in self.history.items():
                self.assert_kept([at.block.version for at in found.index.versions(key)], history)
                newest, *older = [at.delta.name for at in found.index.versions(key)]
                assert newest not in older, "both versions are in one file"
        for key in self.history:
            for at in reader.index.versions(key):
                assert read(reader, at) == content(key, at.block.version, self.sizes[key])
        sizes = files(store)
        assert len(sizes) <= MAX_FILES
        assert sum(sizes.values()) <= STATES * self.state_bytes + save_bytes
        assert set(sizes) == {delta.name.split("/")[1] for delta in store.deltas}

    def assert_kept(self, kept: list[Version], history: list[Version]) -> None:
        assert kept[0] == history[-1]
        assert len(kept) == min(2, len(history)), "no version to fall back to"
        assert set(kept) <= set(history)
        if self.consistent is not None and history[0] <= self.consistent:
            at_the_full_save = max(version for version in history if version.mark <= self.consistent.mark)
            assert at_the_full_save in kept, "the newest full save cannot be read any more"


KEYS = [f"b{i}" for i in range(9)]
subsets = st.sets(st.sampled_from(KEYS), min_size=1)
actions = st.lists(
    st.tuples(st.just("partial"), subsets)
    | st.tuples(st.just("partial"), st.sampled_from(KEYS).map(lambda key: {key}))
    | st.tuples(st.just("full"), subsets)
    | st.tuples(st.just("resume"), subsets)
    | st.tuples(st.just("start afresh"), subsets),
    max_size=30,
)


@given(actions=actions, sizes=st.lists(st.integers(6_000, 30_000), min_size=len(KEYS), max_size=len(KEYS)))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_store_holds_what_was_saved_within_its_bounds(
    memory_url: str, actions: list[tuple[str, set[str]]], sizes: list[int]
) -> None:
    url = f"{memory_url}/{next(COUNTER)}"
    model, store = Model(dict(zip(KEYS, sizes, strict=True))), RankStore(url)
    model.assert_holds(store, url, model.commit(store, set(KEYS), full=True))
    for action, keys in actions:
        if action == "resume":
            model.resume()
        if action == "start afresh":
            model.start_afresh()
            keys = set(KEYS)
        if action in ("resume", "start afresh"):
            store = RankStore(url)
            store.refresh()
        model.assert_holds(store, url, model.commit(store, keys, full=action == "full"))


@pytest.mark.parametrize("full_every", [0, 37])
def test_bounds_hold_when_small_saves_go_on_for_long(memory_url: str, full_every: int) -> None:
    generator = random.Random(full_every)
    model, store = Model({f"b{i}": generator.randint(4_000, 12_000) for i in range(60)}), RankStore(memory_url)
    model.commit(store, set(model.sizes), full=True)
    most = 0
    for i in range(160):
        full = full_every > 0 and i % full_every == 0
        keys = set(model.sizes) if full else {f"b{i % 60}", generator.choice(list(model.sizes))}
        saved = model.commit(store, keys, full)
        most = max(most, len(files(store)))
        if i % 10 == 0 or i > 150:
            model.assert_holds(store, memory_url, saved)
    assert 40 < most <= MAX_FILES, "the saves were too few to need a merge"


def test_bounds_hold_on_every_file_system(url: str) -> None:
    generator = random.Random(0)
    model, store = Model({f"b{i}": 8_000 for i in range(8)}), RankStore(url)
    model.commit(store, set(model.sizes), full=True)
    for i in range(24):
        saved = model.commit(store, set(generator.sample(sorted(model.sizes), 3)), full=i == 12)
    model.assert_holds(store, url, saved)


def test_a_state_smaller_than_its_headers_is_kept_too(memory_url: str) -> None:
    model, store = Model({f"b{i}": 4 for i in range(4)}), RankStore(memory_url)
    for i in range(80):
        model.commit(store, {f"b{i % 4}"} if i else set(model.sizes), full=i == 0)
    for key, history in model.history.items():
        model.assert_kept([located.block.version for located in store.index.versions(key)], history)
    assert newest(store) == check(DeltaStore(memory_url))
    assert len(files(store)) <= MAX_FILES


def test_merged_files_count_as_written(memory_url: str) -> None:
    store, sizes, write = RankStore(memory_url), [], Directory.write

    def watched(self: Directory, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        data = b"".join(pieces)
        sizes.append(len(data))
        write(self, name, [data])

    with patch.object(Directory, "write", watched):
        counted = sum(save(store, [f"b{i}"], at(i), 1_000) for i in range(130))
    assert any(name.startswith("merged-") for name in files(store))
    assert counted == sum(sizes)


def test_a_merge_never_overwrites_what_an_earlier_merge_wrote(memory_url: str) -> None:
    model, store = Model({f"b{i}": 1_000 for i in range(130)}), RankStore(memory_url)
    for key in model.sizes:
        model.commit(store, {key})
    assert sum(name.startswith("merged-") for name in files(store)) > 1
    assert set(check(DeltaStore(memory_url))) == set(model.sizes)


def test_two_files_that_hold_both_versions_of_a_block_become_two(memory_url: str) -> None:
    store = RankStore(memory_url)
    for i, keys in enumerate(("abc", "ab", "bd", "d")):
        save(store, keys, at(i))
    store._merge(head(at(3)), store.own_deltas)
    first, second = sorted(store.deltas, key=lambda delta: len(delta.blocks), reverse=True)
    assert {found.key: found.version.sequence for found in first.blocks} == {"a": 1, "b": 2, "c": 0, "d": 3}
    assert {found.key: found.version.sequence for found in second.blocks} == {"a": 0, "b": 1, "d": 2}
    reader = DeltaStore(memory_url)
    assert check(reader) == newest(store)
    for key in "abd":
        assert read(reader, reader.index.versions(key)[1]) == content(key, reader.index.versions(key)[1].block.version)


def test_a_merge_puts_the_rows_of_a_group_side_by_side_whatever_their_slots(memory_url: str) -> None:
    store, spans = RankStore(memory_url), [(0, 2), (2, 4), (4, 6), (6, 8)]
    store.commit(head(at(0)), [rows("w", spans[:3], at(0)), rows("v", spans, at(0))])
    store.commit(head(at(1)), [rows("w", spans[3:], at(1), slots="param exp_avg"), rows("w", spans[:1], at(1))])
    store.commit(head(at(2)), [rows("w", spans[1:2], at(2), slots="param exp_avg")])
    store._merge(head(at(2)), store.own_deltas)
    merged = max(store.deltas, key=lambda delta: len(delta.blocks))
    assert [(found.key, *found.slots) for found in merged.blocks if found.group == "w"] == [
        ("w[4:6]", "param"),
        ("w[0:2]", "param"),
        ("w[6:8]", "param", "exp_avg"),
        ("w[2:4]", "param", "exp_avg"),
    ]
    assert store.verify() == []
    for found in merged.blocks:
        into = found.new_memory()
        assert not fill([Reading(Located(merged, found), lambda into=into: into)])
        for slot in found.slots:
            assert into[slot] == content(f"{found.key}/{slot}", found.version, 32)


@pytest.mark.parametrize("order", ["in turn", "at random", "furthest first"])
def test_saves_with_a_refresh_stay_within_the_bounds_and_merges_write_little(memory_url: str, order: str) -> None:
    """Each save writes 4 % of the state exactly, and a refresh of 8 % that is dead after the next one."""
    generator, store = random.Random(0), RankStore(memory_url)
    spans = [(i, i + 1) for i in range(100)]
    bases = dict.fromkeys(spans, at(0))
    distances = dict.fromkeys(spans, 0.0)
    row, state = 2_000, 100 * 2_000 + 64
    saved = written = 0
    for i in range(400):
        for span in spans:
            distances[span] += generator.uniform(0, 2)
        chosen = {
            "in turn": [spans[(4 * i + j) % 100] for j in range(4)],
            "at random": generator.sample(spans, 4),
            "furthest first": sorted(spans, key=lambda span: -distances[span])[:4],
        }[order]
        chosen = chosen if i else spans
        bases |= dict.fromkeys(chosen, at(i))
        distances |= dict.fromkeys(chosen, 0.0)
        others = {span: base for span, base in bases.items() if span not in chosen}
        put = [rows("w", chosen, at(i), row), block("skeleton", at(i))]
        refreshes = [refresh("w", others, at(i), codes=row // 12 - 2)] if others else []
        said = head(at(i), state_bytes=state)
        saved += encode(said, put, refreshes).nbytes
        written += store.commit(said, put, refreshes)
        sizes = files(store)
        assert len(sizes) <= MAX_FILES
        assert sum(sizes.values()) <= STATES * state
    assert {span: newest(store)[block_key("w", span)] for span in spans} == bases
    assert store.verify() == []
    assert written / saved < (1.65 if order == "at random" else 1.4)


def test_what_was_written_is_not_read_back(url: str) -> None:
    store = RankStore(url)
    with (
        patch.object(Directory, "open", side_effect=AssertionError),
        patch.object(Directory, "names", side_effect=AssertionError),
    ):
        for i in range(5):
            save(store, "ab", at(i))
    assert newest(store) == check(DeltaStore(url)) == {"a": at(4), "b": at(4)}


def test_what_an_index_remembers_does_not_grow_with_the_number_of_saves(memory_url: str) -> None:
    store = RankStore(memory_url)
    for i in range(300):
        save(store, [f"b{i % 7}"], at(i), state_bytes=7 * 64)
    names = {delta.name for delta in store.deltas}
    assert len(names) < 40
    assert set(store.index._live) <= names
    assert set(store.index._refreshing) <= names


# -- reading ---------------------------------------------------------------------------------------------------------


def test_an_empty_directory_holds_nothing(url: str) -> None:
    store = RankStore(url)
    store.refresh()
    assert store.is_empty()
    assert store.deltas == []
    assert store.foreign_names() == []
    assert store.verify() == []


def test_a_committed_save_is_read_back_by_another_store(url: str) -> None:
    nbytes = save(RankStore(url), "abc", at(0))
    save(RankStore(url), "b", at(1))
    reader = DeltaStore(url)
    assert not reader.is_empty()
    assert check(reader) == {"a": at(0), "b": at(1), "c": at(0)}
    assert reader.verify() == []
    assert reader.deltas[0].nbytes == nbytes


def test_a_refresh_sees_what_was_written_since(url: str) -> None:
    writer, reader = RankStore(url), DeltaStore(url)
    for i in range(5):
        save(writer, "ab", at(i))
        assert check(reader) == {"a": at(i), "b": at(i)}


def test_blocks_are_read_whatever_rank_wrote_them(url: str) -> None:
    for rank, keys in enumerate(("ab", "cd")):
        save(RankStore(url, rank=rank, world_size=2), keys, at(0), rank=rank, world_size=2)
    assert set(check(DeltaStore(url))) == set("abcd")


def test_a_rank_deletes_no_file_of_another(url: str) -> None:
    other = RankStore(url, rank=1, world_size=2)
    save(other, "a", at(0), rank=1)
    for i in range(1, 4):
        save(RankStore(url, rank=0, world_size=2), "a", at(i))
    assert len(files(other)) == 1


def test_what_is_no_running_checkpoint_is_named(url: str) -> None:
    folder = Directory(url)
    folder.create()
    folder.write("model.ckpt", [b"1"])
    folder.write(".hidden", [b"1"])
    assert DeltaStore(url).foreign_names() == [".hidden", "model.ckpt"]
    save(RankStore(url), "a", at(0))
    assert DeltaStore(url).foreign_names() == []


def test_a_directory_that_only_has_a_lease_is_ours(url: str) -> None:
    Directory(url).create()
    Directory(url).write("lease.json", [b"{}"])
    assert DeltaStore(url).foreign_names() == []
    assert DeltaStore(url).is_empty()


@pytest.mark.parametrize("copied", ["rank-0000.bak", "rank-0000 (copy)", "rank-00000", "rank-0000x", "old-rank-0000"])
def test_a_copy_of_a_ranks_folder_is_nobodys(file_url: str, copied: str) -> None:
    store = RankStore(file_url)
    save(store, "a", at(0))
    shutil.copytree(Path(file_url) / store.folder, Path(file_url) / copied)
    for _ in range(3):
        store = RankStore(file_url)
        store.refresh()
        store.sweep()
        save(store, "a", at(len(store.deltas)))
    assert check(DeltaStore(file_url)) == {"a": at(2)}
    assert DeltaStore(file_url).folders() == ["rank-0000"]
    assert len(list((Path(file_url) / copied).iterdir())) == 1


def test_other_files_in_a_ranks_folder_do_not_count(file_url: str) -> None:
    store = RankStore(file_url)
    save(store, "a", at(0))
    folder = Path(file_url) / store.folder
    data = (folder / next(iter(files(store)))).read_bytes()
    (folder / ".delta-00001-00000001.safetensors.77.tmp").write_bytes(data[:100])
    (folder / "delta-00001-00000002.safetensors.part").write_bytes(data)
    reader = DeltaStore(file_url)
    assert check(reader) == {"a": at(0)}
    assert len(reader.deltas) == 1


def test_a_newer_format_is_refused_and_the_file_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save(RankStore(url), "a", at(0))
    monkeypatch.setattr("lightning_scar.storage.delta_file.FORMAT_VERSION", 7)
    save(RankStore(url), "a", at(1))
    monkeypatch.undo()
    with pytest.raises(NewerFormatError, match=r"delta-00001-00000001\.safetensors has format 7.*upgrade"):
        DeltaStore(url).refresh()


# -- damage ----------------------------------------------------------------------------------------------------------


def test_damage_is_named_by_block_step_and_file_and_the_older_version_remains(url: str) -> None:
    store = RankStore(url)
    for i in range(3):
        save(store, "abc", at(i))
    path = damage(store, "b")
    reader = DeltaStore(url)
    (found,) = reader.verify()
    assert (found.block, found.step, found.file) == ("b", 20, path)
    assert str(found).startswith(f"block b of step 20 in {path}: ")
    _, older = reader.index.versions("b")
    assert read(reader, older) == content("b", at(1))


def test_reading_returns_the_damaged_readings_and_fills_the_others(url: str) -> None:
    store = RankStore(url)
    save(store, "abc", at(0))
    damage(store, "b")
    memory = {key: memoryview(bytearray(64)) for key in "abc"}
    readings = [Reading(store.index.versions(k)[0], lambda m=m: {"param": m}) for k, m in memory.items()]
    ((reading, found),) = fill(readings)
    assert reading is readings[1]
    assert found.block == "b"
    assert [bytes(memory[key]) for key in "ac"] == [content(key, at(0)) for key in "ac"]


@pytest.mark.parametrize("memory", [{"param": memoryview(bytearray(63))}, {"other": memoryview(bytearray(64))}, {}])
def test_a_block_that_the_block_map_describes_otherwise_counts_as_damaged(
    url: str, memory: dict[str, memoryview]
) -> None:
    store = RankStore(url)
    save(store, "a", at(0))
    [(_, found)] = fill([Reading(store.index.versions("a")[0], lambda: memory)])
    assert "of the block map" in found.reason


@pytest.mark.parametrize("cut", [1, 30, 10_000])
def test_a_delta_cut_short_is_reported_and_the_one_before_counts(url: str, cut: int) -> None:
    store = RankStore(url)
    save(store, "ab", at(0))
    save(store, "ab", at(1))
    name = store.index.versions("a")[0].delta.name
    data = store.directory.read(name)
    store.directory.write(name, [data[: max(0, len(data) - cut)]])
    reader = DeltaStore(url)
    assert [found.file for found in reader.verify()] == [store.directory.file(name)]
    assert newest(reader) == {"a": at(0), "b": at(0)}


def test_a_damaged_header_is_reported_and_the_delta_before_counts(url: str) -> None:
    store = RankStore(url)
    save(store, "a", at(0))
    save(store, "a", at(1))
    overwrite(store, store.index.versions("a")[0].delta.name, 100)
    reader = DeltaStore(url)
    reader.refresh()
    assert len(reader.damaged) == 1
    assert reader.damaged[0].block is None
    assert newest(reader) == {"a": at(0)}


def test_one_damaged_delta_does_not_keep_the_others_from_being_merged(
    memory_url: str, recwarn: pytest.WarningsRecorder
) -> None:
    model, store = Model({f"b{i}": 2_000 for i in range(60)}), RankStore(memory_url)
    model.commit(store, set(model.sizes), full=True)
    model.commit(store, {"b0"})
    damage(store, "b0")
    for i in range(150):
        model.commit(store, {f"b{1 + i % 59}"})
    assert "delta-00001-00000001.safetensors" in str(recwarn.pop(UserWarning).message)
    assert not recwarn.list, "one warning is enough"
    assert len(files(store)) <= MAX_FILES
    assert any(name.startswith("merged-") for name in files(store))
    reader = DeltaStore(memory_url)
    (found,) = reader.verify()
    assert (found.block, found.step) == ("b0", 7)
    assert read(reader, reader.index.versions("b0")[1]) == content("b0", at(0), 2_000)
    for key, history in model.history.items():
        model.assert_kept([located.block.version for located in reader.index.versions(key)], history)


def test_a_discarded_version_is_not_what_a_new_one_falls_back_to(url: str) -> None:
    writer = RankStore(url)
    save(writer, "ab", at(0))
    save(writer, "a", at(1))
    damage(writer, "a")
    store = RankStore(url)
    store.refresh()
    store.index.discard(store.index.versions("a")[0])
    save(store, "a", at(2))
    assert [found.block.version for found in store.index.versions("a")] == [at(2), at(0)]
    assert read(store, store.index.versions("a")[1]) == content("a", at(0))


# -- incarnations ----------------------------------------------------------------------------------------------------


def test_a_fresh_training_takes_over_only_when_all_its_ranks_have_saved(url: str) -> None:
    old = RankStore(url)
    save(old, "ab", at(3))
    fresh = [RankStore(url, rank=rank, world_size=2) for rank in range(2)]
    for store in fresh:
        store.refresh()
    save(fresh[0], "a", at(0, 2), lineage=(2,), rank=0, world_size=2)
    assert check(DeltaStore(url)) == {"a": at(3), "b": at(3)}
    save(fresh[1], "b", at(0, 2), lineage=(2,), rank=1, world_size=2)
    assert check(DeltaStore(url)) == {"a": at(0, 2), "b": at(0, 2)}


def test_the_older_training_is_deleted_only_when_the_fresh_one_counts(url: str) -> None:
    save(RankStore(url), "ab", at(3))
    fresh = RankStore(url, world_size=2)
    fresh.refresh()
    save(fresh, "a", at(0, 2), lineage=(2,), world_size=2)
    assert len(files(fresh)) == 2
    save(RankStore(url, rank=1, world_size=2), "b", at(0, 2), lineage=(2,), rank=1, world_size=2)
    fresh.refresh()
    save(fresh, "a", at(1, 2), lineage=(2,), world_size=2)
    assert check(DeltaStore(url)) == {"a": at(1, 2), "b": at(0, 2)}
    assert all(name.startswith("delta-00002-") for name in files(fresh))
