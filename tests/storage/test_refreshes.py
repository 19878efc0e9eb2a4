"""The refresh of blocks: which one counts for a version, how it is read, and how long it is kept."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
from toy_blocks import block, content, head, read, refresh, refreshed, rows

from lightning_scar.storage.delta import Encoded, Refresh, Span, block_key
from lightning_scar.storage.head import Version
from lightning_scar.storage.host_memory import HostMemory
from lightning_scar.storage.rank_store import RankStore
from lightning_scar.storage.reading import Damage, read_refreshes
from lightning_scar.storage.store import DeltaStore, retry_vanished

SPANS: list[Span] = [(0, 4), (4, 8), (8, 12), (12, 16)]
STATE = 16 * 16


def at(sequence: int, incarnation: int = 1) -> Version:
    return Version(incarnation, sequence, 10 * sequence)


class Training:
    """Saves of one group: some blocks exactly, a refresh of all the others against their bases."""

    def __init__(self, incarnation: int = 1, bases: Mapping[Span, Version] | None = None) -> None:
        self.incarnation = incarnation
        self.bases: dict[Span, Version] = dict(bases or {})
        self.sequence = itertools.count()

    def save(self, store: RankStore, *chosen: int, **changes: object) -> Version:
        version = at(next(self.sequence), self.incarnation)
        spans = [SPANS[i] for i in chosen] if self.bases else SPANS
        self.bases |= dict.fromkeys(spans, version)
        others = {span: base for span, base in self.bases.items() if span not in spans}
        refreshes = [refresh("w", others, version)] if others else []
        said = head(version, state_bytes=STATE + 64, kind="partial" if others else "full", **changes)
        sections = [block("skeleton", version), *([rows("w", spans, version)] if spans else [])]
        store.commit(said, sections, refreshes)
        return version


def found(store: DeltaStore, i: int, version: int = 0) -> list[tuple[int, int]]:
    """By which saves a version of a block was refreshed."""
    stored = store.index.versions(block_key("w", SPANS[i]))[version].block
    refreshed = store.index.refreshes(stored)
    assert all(each.refresh.spans[each.position] == SPANS[i] for each in refreshed)
    return [(each.delta.head.incarnation, each.delta.head.sequence) for each in refreshed]


def codes(store: DeltaStore, i: int) -> bytes:
    """The codes of the newest refresh of a block."""
    stored = store.index.versions(block_key("w", SPANS[i]))[0].block
    delta, stored_refresh, position = store.index.refreshes(stored)[0]
    [into] = read_refreshes([(delta, stored_refresh)])
    assert isinstance(into, Refresh), into
    assert (into.group, into.spans, into.bases) == ("w", stored_refresh.spans, stored_refresh.bases)
    (piece,) = into.slots["param"].codes
    return bytes(piece[8 * position : 8 * position + 8])


def reader(url: str) -> DeltaStore:
    store = DeltaStore(url)
    retry_vanished(store.refresh)
    return store


# -- which one counts --------------------------------------------------------------------------------------------------


def test_a_refresh_counts_for_exactly_its_base_and_the_newest_comes_first(url: str) -> None:
    store, training = RankStore(url), Training()
    training.save(store)
    for chosen in (0, 1, 0):
        training.save(store, chosen)
    for each in (store, reader(url)):
        assert found(each, 2) == [(1, 3), (1, 2), (1, 1)]
        assert found(each, 1) == [(1, 3)]
        assert found(each, 1, version=1) == [(1, 1)]
        assert found(each, 0) == []
        assert found(each, 0, version=1) == [(1, 2)]
        assert codes(each, 2) == content("codes w[8:12]", at(3), 8)
        assert codes(each, 1) == content("codes w[4:8]", at(3), 8)


def test_a_block_that_is_cut_otherwise_has_no_refresh(memory_url: str) -> None:
    store, training = RankStore(memory_url), Training()
    training.save(store)
    training.save(store, 0)
    store.commit(head(at(2)), [rows("w", [(4, 12)], at(0))])
    stored = store.index.newest("w[4:12]")
    assert stored is not None
    assert store.index.refreshes(stored) == []


def test_a_resumed_training_refreshes_what_the_one_before_wrote_and_a_fresh_one_does_not(memory_url: str) -> None:
    store, first = RankStore(memory_url), Training()
    first.save(store)
    first.save(store, 0)
    resumed = Training(2, first.bases)
    resumed.save(store, 1)
    assert found(store, 2) == [(2, 0), (1, 1)]
    assert store.index.versions("w[8:12]")[0].block.version == at(0)
    fresh = Training(3)
    fresh.save(store, lineage=(3,))
    assert found(store, 2) == []
    fresh.save(store, 0, lineage=(3,))
    assert found(store, 2) == [(3, 1)]


def test_nothing_is_looked_up_at_a_save(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, training = RankStore(memory_url), Training()
    training.save(store)
    with monkeypatch.context() as patch:
        patch.setattr("lightning_scar.storage.index._by_base", lambda _: pytest.fail("looked up"))
        for i in range(40):
            training.save(store, i % 4)
    assert found(store, 0)[0] == (1, 40)


# -- damage ------------------------------------------------------------------------------------------------------------


def damage(store: DeltaStore, kind: str) -> str:
    """Flips a bit of the newest refresh, and returns the path of the file."""
    delta = max(store.deltas, key=lambda delta: delta.head.sequence)
    entry = getattr(delta.refreshes[0].slots["param"], kind)
    data = bytearray(store.directory.read(delta.name))
    data[entry.stop - 1] ^= 1
    store.directory.write(delta.name, [bytes(data)])
    return delta.file


@pytest.mark.parametrize("kind", ["codes", "scales"])
def test_a_damaged_refresh_is_reported_and_costs_precision_only(url: str, kind: str) -> None:
    store, training = RankStore(url), Training()
    training.save(store)
    training.save(store, 0)
    training.save(store, 0)
    path = damage(store, kind)
    found_damage = reader(url).verify()
    assert [(each.file, each.block, each.refresh) for each in found_damage] == [(path, None, "w")]
    assert "refresh of w in" in str(found_damage[0])
    assert str(found_damage[0]).endswith("which costs precision only")
    stored = store.index.versions("w[4:8]")[0]
    newest, older = store.index.refreshes(stored.block)
    bad, good = read_refreshes([newest[:2], older[:2]])
    assert isinstance(bad, Damage)
    assert isinstance(good, Refresh)
    with store.directory.source(stored.delta.name):
        assert len(stored.block.new_memory()["param"]) == 64


def test_no_refresh_is_read_of_nothing(memory_url: str) -> None:
    assert read_refreshes([]) == []


def test_a_reader_that_meets_a_vanished_file_lists_again(url: str) -> None:
    store, training = RankStore(url), Training()
    training.save(store)
    training.save(store, 0)
    late = reader(url)
    delta, stored, _ = late.index.refreshes(late.index.versions("w[4:8]")[0].block)[0]
    for chosen in (0, 1, 0, 1, 2, 3, 2, 3, 0, 1, 2, 3):
        training.save(store, chosen)
    assert delta.name not in {each.name for each in store.deltas}
    with pytest.raises(FileNotFoundError):
        read_refreshes([(delta, stored)])

    def attempt() -> bytes:
        late.refresh()
        return codes(late, 1)

    assert retry_vanished(attempt) == content("codes w[4:8]", at(13), 8)


# -- how long it is kept -----------------------------------------------------------------------------------------------


def test_the_newest_refresh_outlives_all_merges_and_older_ones_go_with_them(memory_url: str) -> None:
    store, training = RankStore(memory_url), Training()
    training.save(store)
    for i in range(300):
        training.save(store, i % 3)
        kept = [delta.head.sequence for delta in store.deltas if delta.refreshes]
        assert kept[-1] == i + 1
        assert found(store, 3)[0] == (1, i + 1)
        assert all(delta.refreshes == () for delta in store.deltas if delta.head.kind == "compacted")
    assert any(delta.head.kind == "compacted" for delta in store.deltas)
    assert found(reader(memory_url), 3)[0] == (1, 300)
    assert reader(memory_url).verify() == []


def test_a_refresh_alone_keeps_its_file_until_the_next_one(memory_url: str) -> None:
    store = RankStore(memory_url)
    store.commit(head(at(0)), [rows("w", SPANS, at(0))])
    for i in (1, 2):
        store.commit(head(at(i)), [], [refresh("w", dict.fromkeys(SPANS, at(0)), at(i))])
        assert found(store, 0) == [(1, i)]
        assert [delta.head.sequence for delta in store.deltas] == [0, i]


def test_the_refresh_of_a_rank_that_is_no_more_is_kept_until_all_have_saved(memory_url: str) -> None:
    stores = [RankStore(memory_url, rank=rank, world_size=4) for rank in range(4)]
    bases = {}
    for rank, store in enumerate(stores):
        section = rows("w", [SPANS[rank]], at(0))
        store.commit(head(at(0), rank=rank, world_size=4), [section, block(f"skeleton-{rank}", at(0))])
        bases[SPANS[rank]] = at(0)
    for rank, store in enumerate(stores):
        also = [refresh("w", {SPANS[rank]: at(0)}, at(1))]
        store.commit(head(at(1), rank=rank, world_size=4), [block(f"skeleton-{rank}", at(1))], also)
    stores = [RankStore(memory_url, rank=rank, world_size=2) for rank in range(2)]
    for store in stores:
        store.refresh()
    stores[0].commit(head(at(0, 2), world_size=2), [rows("w", [SPANS[0]], at(0, 2))])
    assert [found(reader(memory_url), i) for i in range(4)] == [[], [(1, 1)], [(1, 1)], [(1, 1)]]
    for store in reversed(stores):
        others = {span: base for span, base in bases.items() if span != SPANS[0]}
        said = head(at(1, 2), rank=store.rank, world_size=2)
        store.commit(said, [], [refresh("w", others, at(1, 2))] if store.rank else [])
    assert [found(reader(memory_url), i)[:1] for i in range(4)] == [[], *[[(2, 1)]] * 3]


# -- from memory to storage --------------------------------------------------------------------------------------------


def opened(url: str, every: int) -> RankStore:
    store = RankStore(url)
    store.directory.memory = HostMemory(store.directory.storage, "a run")
    store.open(every)
    return store


def test_what_goes_to_storage_brings_the_newest_refresh_along(url: str, host: Path) -> None:
    store, training = opened(url, every=3), Training()
    training.save(store)
    for i in range(1, 8):
        training.save(store, i % 3)
        store.drain()
    stored = reader(url)
    newest = max(delta.head.sequence for delta in stored.deltas)
    assert newest in (5, 6)
    assert found(stored, 3)[0] == (1, newest)
    assert codes(stored, 3) == content("codes w[12:16]", at(newest), 8)
    store.bring_to_storage()
    assert codes(reader(url), 3) == content("codes w[12:16]", at(7), 8)
    assert codes(store, 3) == content("codes w[12:16]", at(7), 8)
    assert store.take_errors() == []
    store.leave_memory(is_stored=True)


def test_a_refresh_that_is_damaged_in_memory_comes_from_storage(url: str, host: Path) -> None:
    store, training = opened(url, every=100), Training()
    training.save(store)
    training.save(store, 0)
    store.bring_to_storage()
    damage(store, "codes")
    assert codes(store, 3) == content("codes w[12:16]", at(1), 8)
    assert store.verify() == []
    store.leave_memory(is_stored=True)


def test_a_save_that_finds_no_room_in_memory_goes_to_storage_with_its_own_refresh(url: str, host: Path) -> None:
    store, training = opened(url, every=10), Training()
    training.save(store)
    training.save(store, 0)
    assert store.write_back is not None
    store.write_back.memory.limit = 10
    training.save(store, 1)
    assert store.directory.trouble is not None
    store.drain()
    stored = reader(url)
    assert [found(stored, i)[:1] for i in range(4)] == [[(1, 2)], [], [(1, 2)], [(1, 2)]]
    assert read_all(stored) == {"w[0:4]": at(1), "w[4:8]": at(2), "w[8:12]": at(0), "w[12:16]": at(0)}
    store.leave_memory(is_stored=True)


def read_all(store: DeltaStore) -> dict[str, Version]:
    """Reads the newest version of every block, and returns the versions."""
    versions = {}
    for span in SPANS:
        key = block_key("w", span)
        located = store.index.versions(key)[0]
        assert read(store, located) == content(f"{key}/param", located.block.version, 64)
        versions[key] = located.block.version
    return versions


def test_an_encoded_slot_may_come_in_pieces(memory_url: str) -> None:
    store = RankStore(memory_url)
    store.commit(head(at(0)), [rows("w", SPANS, at(0))])
    pieces = [memoryview(bytes([i])) for i in range(6)]
    encoded = Encoded("log8", pieces, [memoryview(b"12")])
    store.commit(head(at(1)), [], [Refresh("w", refreshed({SPANS[0]: at(0)}), {"param": encoded})])
    delta, stored, _ = store.index.refreshes(store.index.versions("w[0:4]")[0].block)[0]
    [into] = read_refreshes([(delta, stored)])
    assert isinstance(into, Refresh)
    assert into.slots["param"] == Encoded("log8", [memoryview(bytes(range(6)))], [memoryview(b"12")])
