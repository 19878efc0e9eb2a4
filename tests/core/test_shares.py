"""Who saves what: every block once, by bytes, and worked out by every rank alone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_scar.core.blocks import BlockMap, Group, Slot
from lightning_scar.core.shares import shares

DTYPES = (torch.float32, torch.float16, torch.float64, torch.uint8)


def group(
    name: str, rows: int, row: int = 1, size: int = 1, slots: int = 1, owner: int | None = None, dtype: int = 0
) -> Group:
    entries = tuple(Slot(f"slot{i}", DTYPES[dtype], None, ((name, i),)) for i in range(slots))
    return Group(name, (rows, row), entries, size, lazy=True, owner=owner)


def keys(block_map: BlockMap) -> list[str]:
    return [each.key(i) for each in block_map.groups for i in range(len(each))]


def largest_block(block_map: BlockMap) -> int:
    return max(block_map.nbytes.tolist())


@st.composite
def states(draw: st.DrawFn, owners: int = 0) -> BlockMap:
    """Maps of odd sizes: rows of 4 bytes to some hundred, groups of one block and of dozens."""
    groups = []
    for i in range(draw(st.integers(1, 12))):
        owner = draw(st.one_of(st.none(), st.integers(0, owners - 1))) if owners else None
        fields = [draw(st.integers(1, most)) for most in (60, 30, 20, 3)]
        groups.append(group(f"g{i}", *fields, owner=owner, dtype=draw(st.integers(0, 3))))
    return BlockMap(tuple(groups), 64)


@given(state=states(owners=5), world_size=st.integers(5, 9))
def test_every_block_is_in_one_share(state: BlockMap, world_size: int) -> None:
    parts = shares(state, world_size)
    assert len(parts) == world_size
    found = [key for part in parts for key in keys(part)]
    assert sorted(found) == sorted(keys(state))
    assert sum(part.state_bytes for part in parts) == state.state_bytes
    assert all(part.block_size == state.block_size for part in parts)


@given(state=states(), world_size=st.integers(1, 9))
def test_shares_are_of_equal_bytes_but_for_two_blocks(state: BlockMap, world_size: int) -> None:
    # A rank's part of a group is what it still wants, in proportion, rounded down, and one more block where it wants
    # most. In a group of few blocks the proportion is off by a block, and so is that one more.
    for part in shares(state, world_size):
        assert part.state_bytes <= state.state_bytes / world_size + 2 * largest_block(state)


@given(state=states(owners=3), world_size=st.integers(3, 6))
def test_what_a_rank_has_from_the_start_counts_for_its_share(state: BlockMap, world_size: int) -> None:
    # In first slots only, of which all ranks know.
    known = [replace(each, slots=each.slots[:1]) if each.owner is not None else each for each in state.groups]
    state = BlockMap(tuple(known), state.block_size)
    pinned = [sum(g.rows * g.row_nbytes for g in state.groups if g.owner == rank) for rank in range(world_size)]
    for rank, part in enumerate(shares(state, world_size)):
        fair = max(state.state_bytes / world_size, pinned[rank])
        assert part.state_bytes <= fair + 2 * largest_block(state)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("sizes", [(1024, 32), (1056, 32), (33, 1), (1, 33), (100, 100, 1)])
def test_small_and_large_groups_in_turn_do_not_make_one_rank_save_all_the_large(
    sizes: tuple[int, ...], world_size: int
) -> None:
    """Weight, bias, weight, bias, ...: all of one block, or of one and a little."""
    rows = [rows for _ in range(24) for rows in sizes]
    state = BlockMap(tuple(group(f"g{i}", n, size=1024 if n > 512 else 32) for i, n in enumerate(rows)), 4096)
    loads = [part.state_bytes for part in shares(state, world_size)]
    assert max(loads) - min(loads) <= 2 * largest_block(state), loads


@given(state=states(owners=2), world_size=st.integers(2, 4))
def test_shares_follow_from_the_map_alone(state: BlockMap, world_size: int) -> None:
    again = BlockMap(tuple(replace(each) for each in state.groups), state.block_size)
    assert shares(state, world_size) == shares(again, world_size)


@given(state=states(owners=3), world_size=st.integers(3, 5), extra=st.integers(1, 3))
def test_ranks_that_see_other_slots_of_pinned_groups_divide_the_same_way(
    state: BlockMap, world_size: int, extra: int
) -> None:
    first_slots = [replace(each, slots=each.slots[:1]) if each.owner is not None else each for each in state.groups]
    seen = [
        replace(each, slots=(*each.slots, *(Slot(f"more{i}", torch.float64, None, ((i,),)) for i in range(extra))))
        if each.owner == 0
        else each
        for each in first_slots
    ]
    maps = [BlockMap(tuple(groups), state.block_size) for groups in (first_slots, seen, state.groups)]
    first, *others = ([keys(part) for part in shares(each, world_size)] for each in maps)
    assert all(other == first for other in others)


@given(state=states(owners=4), world_size=st.integers(4, 6))
def test_a_pinned_group_goes_whole_to_its_owner(state: BlockMap, world_size: int) -> None:
    parts = shares(state, world_size)
    for each in state.groups:
        holders = [rank for rank, part in enumerate(parts) if each.name in {own.name for own in part.groups}]
        if each.owner is not None:
            assert holders == [each.owner]
            assert each in parts[each.owner].groups


@given(state=states(owners=2), world_size=st.integers(2, 6))
def test_a_share_is_one_run_of_whole_blocks_of_each_group(state: BlockMap, world_size: int) -> None:
    blocks = set(keys(state))
    for each in state.groups:
        row = 0
        for part in shares(state, world_size):
            own = [found for found in part.groups if found.name == each.name]
            assert len(own) <= 1
            for found in own:
                assert found.first_row == row, "a gap, or not in the order of the ranks"
                assert {found.key(i) for i in range(len(found))} <= blocks
                assert replace(found, shape=each.shape, first_row=0) == each
                row += found.rows
        assert row == each.rows


def test_the_rows_of_a_share_are_those_of_the_tensor() -> None:
    tensor = torch.arange(20.0).reshape(10, 2)
    state = BlockMap((group("w", 10, 2, size=3),), 24)
    parts = [part.groups[0].of(tensor) for part in shares(state, 3)]
    assert torch.equal(torch.cat(parts), tensor)


def test_all_ranks_have_a_part_of_a_large_group() -> None:
    state = BlockMap((group("w", 1000, 4), group("v", 700, 8), group("bias", 3)), 16)
    for part in shares(state, 7):
        assert {"w", "v"} <= {each.name for each in part.groups}


def test_more_ranks_than_blocks_leave_some_without_any() -> None:
    parts = shares(BlockMap((group("w", 2),), 4), 4)
    assert sorted(len(part) for part in parts) == [0, 0, 1, 1]
    assert all(part.block_size == 4 for part in parts)


def test_one_rank_has_everything_and_nothing_is_divided() -> None:
    state = BlockMap((group("w", 5, owner=0), group("v", 5)), 4)
    assert shares(state, 1) == [state]
    assert [len(part) for part in shares(BlockMap((), 4), 3)] == [0, 0, 0]


def test_a_0d_tensor_is_a_share_too() -> None:
    state = BlockMap((Group("scale", (), (Slot("param", torch.float32, None, (("scale",),)),), 8),), 4)
    parts = shares(state, 2)
    assert [keys(part) for part in parts] == [["scale[0:1]"], []]
    assert torch.equal(parts[0].groups[0].of(torch.tensor(3.0)), torch.tensor([3.0]))


@given(state=states(owners=2), world_size=st.integers(2, 4), rows=st.integers(1, 50))
def test_what_only_the_first_rank_knows_of_changes_nothing_for_the_others(
    state: BlockMap, world_size: int, rows: int
) -> None:
    own = replace(group("callback", rows, owner=0), lazy=False)
    seen_by_first = shares(BlockMap((own, *state.groups), state.block_size), world_size)
    seen_by_others = shares(state, world_size)
    assert seen_by_first[0].groups == (own, *seen_by_others[0].groups)
    assert seen_by_first[1:] == seen_by_others[1:]
