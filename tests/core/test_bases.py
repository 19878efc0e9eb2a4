"""What the owner remembers of its blocks: bases, versions, and what a frozen tensor is recognised by."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from core_helpers import bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_scar.core.bases import NEVER, Base, Bases, Seen, runs
from lightning_scar.core.blocks import BlockMap, Group, Slot
from lightning_scar.core.shares import shares
from lightning_scar.storage.head import Version


def group_of(name: str, tensor: Tensor, *state: str, rows_per_block: int = 2, frozen: bool = False) -> Group:
    slots = tuple(Slot(slot, tensor.dtype, None, ()) for slot in ("param", *state))
    return Group(name, tuple(tensor.shape), slots, rows_per_block, frozen=frozen)


def map_of(**tensors: Tensor) -> BlockMap:
    return BlockMap(tuple(group_of(name, tensor) for name, tensor in tensors.items()), 8)


def fitted(**tensors: Tensor) -> Bases:
    bases = Bases()
    bases.fit(map_of(**tensors), [[tensor] for tensor in tensors.values()])
    return bases


def record(bases: Bases, g: int, live: Tensor, numbers: list[int], sequence: int, step: int = 0) -> None:
    """Notes a save of some blocks of a group."""
    group = bases.map.groups[g]
    for number in numbers:
        rows = slice(*group.span(number))
        values = bases.values(group)
        assert values is not None
        values[rows] = (live if live.dim() else live.unsqueeze(0))[rows]
    bases.record(torch.tensor(numbers) + bases.map.offsets[g], Version(1, sequence, step or sequence))


def test_at_first_no_block_was_ever_saved() -> None:
    bases = fitted(a=torch.ones(5, 1), b=torch.ones(2, 1))
    assert bases.steps.tolist() == [NEVER] * 4
    assert not bases.is_known().any()


def test_recorded_blocks_are_remembered_with_their_version_and_values() -> None:
    a, b = torch.arange(5.0).view(5, 1), torch.ones(3, 1)
    bases = fitted(a=a, b=b)
    record(bases, 0, a, [0, 1, 2], sequence=3, step=30)
    record(bases, 1, b, [1], sequence=4, step=40)
    a += 10
    record(bases, 0, a, [2], sequence=5, step=50)
    assert bases.steps.tolist() == [30, 30, 50, NEVER, 40]
    assert bases.sequences.tolist() == [3, 3, 5, NEVER, 4]
    assert bases.incarnations.tolist() == [1, 1, 1, NEVER, 1]
    assert bases.is_known().tolist() == [True, True, True, False, True]
    assert bases.values(bases.map.groups[0]).flatten().tolist() == [0, 1, 2, 3, 14]  # type: ignore[union-attr]
    assert list(bases.written_by(Version(1, 3, 30))) == ["a[0:2]", "a[2:4]"]


def test_a_block_whose_write_failed_is_due_until_it_is_written_again() -> None:
    a = torch.zeros(4, 1)
    bases = fitted(a=a)
    record(bases, 0, a, [0, 1], sequence=3)
    bases.fail(torch.tensor([1]))
    assert bases.is_known().tolist() == [True, False]
    record(bases, 0, a, [1], sequence=4)
    assert bases.is_known().tolist() == [True, True]


def test_forgotten_blocks_count_as_never_saved() -> None:
    a = torch.zeros(4, 1)
    bases = fitted(a=a)
    record(bases, 0, a, [0, 1], sequence=7)
    bases.forget(torch.tensor([0]))
    assert bases.steps.tolist() == [NEVER, 7]


def test_the_base_has_the_layout_of_the_live_tensor() -> None:
    live = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    values = fitted(a=live).values(map_of(a=live).groups[0])
    assert values is not None
    assert values.stride() == live.stride()


def test_adopted_values_take_the_layout_of_the_live_tensor() -> None:
    values = torch.randn(4, 3, 2, 2)
    live = values.to(memory_format=torch.channels_last)
    bases = Bases()
    bases.adopt(map_of(a=values), {"a": values}, {"a[0:2]": Version(1, 4, 4), "a[2:4]": Version(1, 6, 6)})
    bases.fit(map_of(a=values), [[live]])
    found = bases.values(bases.map.groups[0])
    assert found is not None
    assert found.stride() == live.stride()
    assert torch.equal(found, values)
    assert bases.sequences.tolist() == [4, 6]


def test_a_block_that_was_not_restored_counts_as_never_saved() -> None:
    values = torch.zeros(4, 1)
    bases = Bases()
    bases.adopt(map_of(a=values), {"a": values}, {"a[2:4]": Version(1, 6, 6)})
    assert bases.steps.tolist() == [NEVER, 6]


def test_what_is_known_of_unchanged_groups_survives_new_ones_in_front() -> None:
    a, new = torch.arange(4.0).view(4, 1), torch.zeros(2, 1)
    bases = fitted(a=a)
    record(bases, 0, a, [0, 1], sequence=7)
    bases.fail(torch.tensor([1]))
    bases.fit(map_of(new=new, a=a), [[new], [a]])
    assert bases.steps.tolist() == [NEVER, 7, 7]
    assert bases.due.tolist() == [False, False, True]
    assert torch.equal(bases.values(bases.map.groups[1]), a)  # type: ignore[arg-type]


def test_a_group_with_new_state_shape_or_dtype_counts_as_never_saved() -> None:
    a = torch.zeros(4, 1)
    for changed, state in [(a, ["exp_avg"]), (torch.zeros(6, 1), []), (a.double(), [])]:
        bases = fitted(a=a)
        record(bases, 0, a, [0, 1], sequence=7)
        bases.fit(BlockMap((group_of("a", changed, *state),), 8), [[changed, *[changed for _ in state]]])
        assert set(bases.steps.tolist()) == {NEVER}


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 4))
def test_a_share_of_what_was_restored_is_known_with_its_rows(rows: int, per_block: int, n: int) -> None:
    values = torch.arange(float(rows)).view(rows, 1)
    whole = BlockMap((group_of("a", values, rows_per_block=per_block),), 8)
    versions = {key: Version(1, number, number) for key, number in whole.numbers.items()}
    for own in shares(whole, n):
        bases = Bases()
        bases.adopt(whole, {"a": values.clone()}, versions)
        bases.fit(own, [[group.of(values)] for group in own.groups])
        for group in own.groups:
            assert torch.equal(bases.values(group), group.of(values))  # type: ignore[arg-type]
        assert bases.sequences.tolist() == [whole.numbers[key] for key in own.numbers]


def test_a_0d_tensor_is_remembered_as_one_row() -> None:
    scalar = torch.tensor(3.0)
    bases = fitted(a=scalar)
    record(bases, 0, scalar, [0], sequence=1)
    assert bases.values(bases.map.groups[0]).tolist() == [3.0]  # type: ignore[union-attr]


# -- frozen ----------------------------------------------------------------------------------------------------------


def frozen(tensor: Tensor) -> Bases:
    bases = Bases()
    bases.fit(BlockMap((group_of("a", tensor, frozen=True),), 8), [[tensor]])
    return bases


def test_a_frozen_tensor_needs_no_copy() -> None:
    tensor = torch.randn(64, 64)
    bases = frozen(tensor)
    assert bases.values(bases.map.groups[0]) is None
    bases.freeze(0, tensor)
    seen = bases.base(bases.map.groups[0]).seen
    assert seen is not None
    assert not seen.differs(tensor)


def test_a_frozen_tensor_that_has_moved_is_compared_like_others_from_then_on() -> None:
    tensor = torch.randn(4, 4)
    bases = frozen(tensor)
    bases.freeze(0, tensor)
    bases.record(torch.arange(2), Version(1, 1, 1))
    bases.thaw(0, tensor)
    assert bases.values(bases.map.groups[0]) is not None
    assert bases.due.tolist() == [True, True]
    bases.freeze(0, tensor)
    assert bases.values(bases.map.groups[0]) is not None, "it may move again"


@pytest.mark.parametrize("size", [1, 3, 1000, 1024, 5000, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_a_write_to_all_of_a_frozen_tensor_is_noticed_even_past_its_counter(size: int, dtype: torch.dtype) -> None:
    tensor = torch.arange(size).to(dtype)
    seen = Seen.of(tensor)
    assert not seen.differs(tensor)
    tensor.data += 7 if dtype != torch.bfloat16 else 1e9
    assert seen.differs(tensor)


def test_a_write_to_one_value_of_a_frozen_tensor_is_noticed_by_its_counter() -> None:
    tensor = torch.zeros(100_000)
    seen = Seen.of(tensor)
    tensor[77_777] += 1
    assert seen.differs(tensor)


def test_another_tensor_in_the_place_of_a_frozen_one_is_noticed() -> None:
    tensor = torch.zeros(10)
    assert Seen.of(tensor).differs(tensor.clone())


def test_a_frozen_tensor_with_nan_has_not_changed() -> None:
    tensor = torch.full((10,), torch.nan)
    assert not Seen.of(tensor).differs(tensor)


def test_frozen_tensors_are_sampled_whatever_their_layout() -> None:
    tensor = torch.randn(40, 30, 5, 5).to(memory_format=torch.channels_last)
    seen = Seen.of(tensor)
    assert not seen.differs(tensor)
    tensor.data.neg_()
    assert seen.differs(tensor)


def test_a_part_of_a_frozen_tensor_is_looked_at_once_by_its_new_owner() -> None:
    tensor = torch.randn(8, 4)
    bases = frozen(tensor)
    bases.freeze(0, tensor)
    bases.record(torch.arange(4), Version(1, 1, 1))
    [own, _] = shares(bases.map, 2)
    [group] = own.groups
    bases.fit(own, [[group.of(tensor)]])
    seen = bases.base(group).seen
    assert seen is None or bool(seen.differs(group.of(tensor)))
    assert replace(group, frozen=True) == group
    assert bases.base(group) == Base(None, seen)


# -- runs --------------------------------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 40)))
def test_runs_are_the_numbers_again_and_no_two_of_them_touch(numbers: set[int]) -> None:
    found = list(runs(sorted(numbers)))
    assert [n for start, stop in found for n in range(start, stop)] == sorted(numbers)
    assert all(start < stop for start, stop in found)
    assert all(first[1] < second[0] for first, second in pairwise(found))


def test_adopted_values_are_kept_not_copied() -> None:
    values = torch.randn(4, 1)
    bases = Bases()
    bases.adopt(map_of(a=values), {"a": values}, {"a[0:2]": Version(1, 4, 4), "a[2:4]": Version(1, 6, 6)})
    bases.fit(map_of(a=values), [[values.clone()]])
    found = bases.values(bases.map.groups[0])
    assert found is not None
    assert found.data_ptr() == values.data_ptr()
    assert torch.equal(bits(found), bits(values))
