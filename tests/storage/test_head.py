"""What a delta says about itself, and what the newest ones say together."""

import dataclasses
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_blocks import head

from lightning_scar.storage.head import Head, Mark, Version, newest_consistent, newest_heads

small = st.integers(0, 2**53)
marks = st.builds(Mark, small, small)
infos = st.dictionaries(
    st.text(), st.one_of(st.none(), st.booleans(), small, st.text(), st.floats(allow_nan=False, allow_infinity=False))
)
heads = st.builds(
    Head,
    incarnation=small,
    lineage=st.lists(small).map(tuple),
    sequence=small,
    step=small,
    rank=small,
    world_size=small,
    kind=st.sampled_from(["full", "partial", "compacted"]),
    whole=st.booleans(),
    consistent=st.lists(marks).map(tuple),
    state_bytes=small,
    info=infos,
)


@given(heads)
def test_a_head_comes_back_as_it_was(said: Head) -> None:
    again = Head.from_json(said.to_json())
    assert again == said
    assert all(isinstance(mark, Mark) for mark in again.consistent)
    assert isinstance(again.lineage, tuple)


@pytest.mark.parametrize("missing", [field.name for field in dataclasses.fields(Head)])
def test_a_head_without_a_field_is_none(missing: str) -> None:
    text = head().to_json().replace(f'"{missing}"', f'"not {missing}"')
    with pytest.raises((TypeError, KeyError, ValueError)):
        Head.from_json(text)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"lineage": 3, "consistent": []}'])
def test_what_is_no_head_is_an_error_that_readers_expect(text: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        Head.from_json(text)


def said(rank: int, sequence: int, incarnation: int = 1, consistent: tuple[int, ...] = (), n: int = 2) -> Head:
    """Full saves are named by their step; those of 100 and more are of the second incarnation."""
    known = tuple(Mark(1 + step // 100, step) for step in consistent)
    return head(Version(incarnation, sequence, sequence), known, rank=rank, world_size=n)


def test_the_newest_head_of_every_rank_counts_in_any_order() -> None:
    found = [said(rank, sequence) for rank in (1, 0, 2) for sequence in range(4)]
    for seed in range(20):
        random.Random(seed).shuffle(found)
        newest = newest_heads(found)
        assert list(newest) == [0, 1, 2]
        assert all(newest[rank] == said(rank, 3) for rank in newest)


def test_only_ranks_that_have_written_since_the_last_start_are_named() -> None:
    before = [said(rank, 9) for rank in range(3)]
    for order in itertools.permutations([*before, said(1, 0, incarnation=2)]):
        assert newest_heads(order) == {1: said(1, 0, incarnation=2)}
    assert newest_heads(newest_heads(before).values()) == newest_heads(before)
    assert newest_heads([]) == {}


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        pytest.param([()], None, id="no full save"),
        pytest.param([(1, 5), (1,)], 1, id="one has still to finish it"),
        pytest.param([(1, 5), (1, 5)], 5, id="all have finished it"),
        pytest.param([(1, 5), (5,)], 5, id="one has given the older one up"),
        pytest.param([(1, 5), (1, 9)], 1, id="each has failed another one"),
        pytest.param([(1,), (5,)], None, id="nothing in common"),
        pytest.param([(1, 5, 9), (1, 9), (9, 5)], 9, id="three ranks"),
        pytest.param([(1, 5, 9), (1, 9), (5,)], None, id="two of three"),
    ],
)
def test_a_full_save_counts_when_all_ranks_serve_it(claims: list[tuple[int, ...]], expected: int | None) -> None:
    found = {rank: said(rank, 7, consistent=steps, n=len(claims)) for rank, steps in enumerate(claims)}
    assert newest_consistent(found) == (None if expected is None else Mark(1, expected))


def test_without_heads_nothing_counts() -> None:
    assert newest_consistent({}) is None


def test_who_has_written_nothing_since_the_start_serves_what_was_there_before() -> None:
    first = said(0, 0, incarnation=2, consistent=(5, 100))
    assert newest_consistent({0: first}) == Mark(1, 5)
    assert newest_consistent({0: first, 1: said(1, 0, incarnation=2, consistent=(5,))}) == Mark(1, 5)
    assert newest_consistent({0: first, 1: said(1, 0, incarnation=2, consistent=(5, 100))}) == Mark(2, 100)


def test_the_order_of_marks_is_that_of_starts_and_steps() -> None:
    assert Mark(1, 900) < Mark(2, 0) < Mark(2, 1)
    assert Version(3, 4, 5).mark == Mark(3, 5)
