"""When deltas are merged, and which."""

from hypothesis import given
from hypothesis import strategies as st

from lightning_scar.storage.compaction import MAX_FILES, STATES, Usage, worth_merging

STATE = 1000

usage_of_one = st.tuples(st.integers(1, 300), st.integers(0, 10)).map(lambda u: Usage(u[0], u[0] * u[1] // 10))
usages = st.lists(usage_of_one, max_size=12) | st.lists(usage_of_one, min_size=40, max_size=64)


def merged(usage: list[Usage], chosen: list[int]) -> list[Usage]:
    """What is left after a merge into two files."""
    rest = [each for i, each in enumerate(usage) if i not in chosen]
    live = sum(usage[i].live for i in chosen)
    return [*rest, Usage(live // 2, live // 2), Usage(live - live // 2, live - live // 2)]


def settled(usage: list[Usage], save_bytes: int) -> list[Usage]:
    for _ in range(2 * len(usage) + 1):
        chosen = worth_merging(usage, STATE, save_bytes)
        if not chosen:
            return usage
        usage = merged(usage, chosen)
    raise AssertionError("merging does not come to an end")


def test_a_store_within_its_bounds_is_left_alone() -> None:
    assert worth_merging([Usage(100, 1)] * 20, STATE, 100) == []
    assert worth_merging([], STATE, 100) == []


def test_when_bytes_run_out_the_emptiest_delta_goes_first() -> None:
    usage = [Usage(1000, 900), Usage(1000, 700), Usage(1000, 300), Usage(10, 10)]
    assert worth_merging(usage, STATE, 100) == [2]


def test_several_nearly_empty_deltas_become_one() -> None:
    usage = [Usage(1000, 1000), Usage(1000, 40), Usage(1000, 950), Usage(1000, 30), Usage(1000, 50)]
    assert worth_merging(usage, STATE, 100) == [3, 1, 4]


def test_when_files_run_out_the_smallest_become_one() -> None:
    usage = [Usage(50, 50)] * 47 + [Usage(9, 9), Usage(8, 8)]
    assert set(worth_merging(usage, STATE, 10)) > {47, 48}


def test_when_too_many_files_are_all_large_three_become_fewer() -> None:
    assert len(worth_merging([Usage(STATE // 4, STATE // 4)] * (MAX_FILES - 1), STATE, 10)) == 3


def test_of_two_equally_empty_deltas_the_one_that_lives_longer_goes_first() -> None:
    rest = [Usage(1000, 1000)] * 2
    for longer in (Usage(1000, 300, newest=1.0, age=9), Usage(1000, 300, newest=0.2, age=1)):
        assert worth_merging([*rest, Usage(1000, 300, newest=0.2, age=9), longer], STATE, 100)[0] == 3


def test_what_may_not_be_merged_counts_and_stays() -> None:
    usage = [Usage(1000, 1000)] * 2 + [Usage(900, 100, may_merge=False), Usage(500, 400)]
    assert worth_merging(usage, STATE, 100) == [3]
    many = [Usage(10, 10, may_merge=False)] * 3 + [Usage(20, 20)] * 47
    assert set(worth_merging(many, STATE, 10)).isdisjoint(range(3))


def test_a_save_as_large_as_the_state_leaves_room_for_what_is_dead() -> None:
    assert worth_merging([Usage(1000, 1000), Usage(1000, 950), Usage(800, 40)], STATE, STATE) == []


@given(usage=usages, save_bytes=st.integers(0, STATE))
def test_merging_ends_and_leaves_room_for_the_next_save(usage: list[Usage], save_bytes: int) -> None:
    live = sum(each.live for each in usage)
    after = settled(usage, save_bytes)
    assert len(after) < MAX_FILES
    assert sum(each.live for each in after) == live
    if live <= 2 * STATE:
        assert sum(each.nbytes for each in after) <= max(STATES * STATE - min(save_bytes, STATE / 8), live / 0.9)


@given(usage=usages, save_bytes=st.integers(0, STATE))
def test_what_is_chosen_is_chosen_once_and_is_worth_its_copy(usage: list[Usage], save_bytes: int) -> None:
    chosen = worth_merging(usage, STATE, save_bytes)
    assert len(set(chosen)) == len(chosen)
    if chosen:
        before, after = usage, merged(usage, chosen)
        assert len(after) < len(before) or sum(u.nbytes for u in after) < sum(u.nbytes for u in before)


@given(usage=usages, save_bytes=st.integers(0, STATE))
def test_a_merge_of_several_deltas_copies_no_more_than_an_eighth_of_the_state(
    usage: list[Usage], save_bytes: int
) -> None:
    chosen = worth_merging(usage, STATE, save_bytes)
    few = 3 if len(usage) > MAX_FILES * 3 // 4 else 1
    assert len(chosen) <= few or sum(usage[i].live for i in chosen) <= STATE / 8


def test_where_headers_outweigh_the_state_a_quarter_may_be_dead() -> None:
    # Of 1,000 bytes of tiny blocks, two versions with their headers.
    usage = [Usage(4000, 3500), Usage(4000, 3700)]
    assert worth_merging(usage, STATE, 100) == []
    assert worth_merging([*usage, Usage(4000, 1000)], STATE, 100) == [2]
