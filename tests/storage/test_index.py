"""Which incarnations count, and which versions of a block are kept."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_blocks import block, head

from lightning_scar.storage.delta import Delta
from lightning_scar.storage.delta_file import encode
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.head import Version
from lightning_scar.storage.index import Index, newest_lineage

FOLDER = Directory("memory://index")
COUNTER = itertools.count()


def version(sequence: int, incarnation: int = 1) -> Version:
    return Version(incarnation, sequence, 10 * sequence)


def delta(
    at: Version,
    keys: str = "",
    *,
    consistent: Version | None = None,
    lineage: tuple[int, ...] | None = None,
    versions: Sequence[Version] = (),
    rank: int = 0,
    world_size: int = 1,
) -> Delta:
    """A real delta with one block for each letter, of the delta's own version or of each of ``versions``."""
    name = f"{next(COUNTER)}.safetensors"
    lineage = lineage or tuple(range(1, at.incarnation + 1))
    said = head(at, consistent=consistent, lineage=lineage, rank=rank, world_size=world_size)
    return encode(said, [block(key, each) for key in keys for each in versions or [at]]).write(FOLDER, name)


def kept(index: Index, key: str) -> list[int]:
    return [at.block.version.sequence for at in index.versions(key)]


def test_the_newest_version_and_the_one_before_are_kept() -> None:
    index = Index((1,), [delta(version(i), "a") for i in range(4)])
    assert kept(index, "a") == [3, 2]
    assert index.newest("a") == index.versions("a")[0].block


def test_an_unknown_block_has_no_version() -> None:
    index = Index((1,), [delta(version(0), "a")])
    assert index.versions("b") == []
    assert index.newest("b") is None
    assert list(index.keys()) == ["a"]


def test_the_consistent_version_is_kept_below_the_newest() -> None:
    full = version(1)
    index = Index((1,), [delta(version(0), "ab"), delta(full, "a", consistent=full)])
    for i in range(2, 6):
        index.add(delta(version(i), "ab", consistent=full))
    assert index.consistent == full.mark
    assert kept(index, "a") == [5, 1]
    assert kept(index, "b") == [5, 0], "b did not change between its save and the full save"


def test_a_block_that_is_newer_than_the_full_save_falls_back_to_the_version_before() -> None:
    full = version(1)
    index = Index((1,), [delta(full, "a", consistent=full), *(delta(version(i), "b", consistent=full) for i in (2, 3))])
    assert kept(index, "b") == [3, 2]


def test_the_next_full_save_frees_the_older_one() -> None:
    first, second = version(0), version(3)
    deltas = [
        delta(first, "ab", consistent=first),
        delta(version(1), "a", consistent=first),
        delta(version(2), "a", consistent=first),
        delta(second, "a", consistent=second),
    ]
    index = Index((1,), deltas[:3])
    assert kept(index, "a") == [2, 0]
    index.add(deltas[3])
    assert kept(index, "a") == [3, 2]
    assert kept(index, "b") == [0]
    index.add(delta(version(4), "ab", consistent=second))
    assert kept(index, "a") == [4, 3]
    assert kept(index, "b") == [4, 0]


def test_live_names_the_blocks_for_whose_sake_a_delta_is_needed() -> None:
    deltas = [delta(version(0), "abc"), delta(version(1), "ab"), delta(version(2), "a")]
    index = Index((1,), deltas)
    assert ["".join(sorted(found.key for found in index.live(each))) for each in deltas] == ["bc", "ab", "a"]
    assert index.live(delta(version(9), "a")) == []


def test_of_two_copies_of_a_version_the_one_in_the_later_delta_counts() -> None:
    first, second = delta(version(0), "a"), delta(version(1), "a")
    merged = delta(version(2), "a", versions=[version(0), version(1)])
    index = Index((1,), [first, second])
    index.add(merged)
    assert kept(index, "a") == [1, 0]
    assert [at.delta.name for at in index.versions("a")] == [merged.name] * 2
    assert index.live(first) == index.live(second) == []


def test_a_discarded_version_gives_way_to_the_older_one() -> None:
    index = Index((1,), [delta(version(i), "a") for i in range(2)])
    index.discard(index.versions("a")[0])
    assert kept(index, "a") == [0]
    index.add(delta(version(2), "a"))
    assert kept(index, "a") == [2, 0]


def test_the_only_version_is_not_discarded() -> None:
    index = Index((1,), [delta(version(0), "a")])
    index.discard(index.versions("a")[0])
    assert kept(index, "a") == [0]


HISTORY = [
    delta(version(i), keys, consistent=version(2) if i >= 2 else None)
    for i, keys in enumerate(["abcd", "ab", "acd", "bc", "ad", "a"])
] + [delta(version(6), "a", versions=[version(2), version(5)], consistent=version(2))]


@given(order=st.permutations(HISTORY))
def test_the_order_in_which_deltas_are_found_makes_no_difference(order: list[Delta]) -> None:
    index, expected = Index((1,), order), Index((1,), HISTORY)
    assert {key: index.versions(key) for key in "abcd"} == {key: expected.versions(key) for key in "abcd"}
    assert kept(index, "a") == [5, 2]


@given(split=st.integers(0, len(HISTORY)))
def test_adding_deltas_one_by_one_comes_to_the_same_as_reading_them_all(split: int) -> None:
    index, expected = Index((1,), HISTORY[:split]), Index((1,), HISTORY)
    for each in HISTORY[split:]:
        index.add(each)
    assert {key: kept(index, key) for key in "abcd"} == {key: kept(expected, key) for key in "abcd"}
    for each in HISTORY:
        assert {found.key for found in index.live(each)} == {found.key for found in expected.live(each)}


def test_without_deltas_nothing_counts() -> None:
    assert newest_lineage([]) == ()


def test_a_fresh_incarnation_counts_only_when_the_first_save_of_all_ranks_is_there() -> None:
    old = delta(version(0), "a")
    first = delta(version(0, 2), "a", lineage=(2,), rank=0, world_size=2)
    second = delta(version(0, 2), "b", lineage=(2,), rank=1, world_size=2)
    later = delta(version(1, 2), "a", lineage=(2,), rank=0, world_size=2)
    assert newest_lineage([old, first]) == (1,)
    assert newest_lineage([old, first, later]) == (1,)
    assert newest_lineage([old, first, second]) == (2,)
    assert newest_lineage([first]) == ()


def test_a_resumed_incarnation_counts_at_once() -> None:
    old = delta(version(0), "ab")
    resumed = delta(version(0, 2), "a", lineage=(1, 2), rank=0, world_size=2)
    assert newest_lineage([old, resumed]) == (1, 2)
    index = Index((1, 2), [old, resumed])
    assert [at.block.version.incarnation for at in index.versions("a")] == [2, 1]
    assert [at.block.version.incarnation for at in index.versions("b")] == [1]


@pytest.mark.parametrize("lineage", [(1,), (2,)])
def test_two_trainings_never_mix(lineage: tuple[int, ...]) -> None:
    old = delta(version(5), "ab", consistent=version(5))
    fresh = delta(version(0, 2), "a", lineage=(2,))
    index = Index(lineage, [old, fresh])
    index.add(delta(version(1, 3), "a", lineage=(3,)))
    assert {at.block.version.incarnation for key in "ab" for at in index.versions(key)} == set(lineage)
    assert (index.consistent is None) == (lineage == (2,))


def test_a_block_of_another_training_does_not_count_wherever_it_lies() -> None:
    stray = delta(version(1, 2), "a", lineage=(2,), versions=[version(0, 1), version(0, 2)])
    assert [at.block.version for at in Index((2,), [stray]).versions("a")] == [version(0, 2)]


def test_a_run_that_resumed_past_an_unfinished_fresh_one_leaves_it_out() -> None:
    old = delta(version(0), "a")
    unfinished = delta(version(0, 2), "b", lineage=(2,), rank=0, world_size=2)
    resumed = delta(version(0, 3), "a", lineage=(1, 3))
    assert newest_lineage([old, unfinished, resumed]) == (1, 3)
    assert list(Index((1, 3), [old, unfinished, resumed]).keys()) == ["a"]
