import torch
from torch import Tensor

from lightning_scar.core.blocks import BlockMap, Group, Slot
from lightning_scar.core.last_saved import NEVER, LastSaved
from lightning_scar.core.staging import StagingBuffer, stage


def group_of(name: str, tensor: Tensor, *state: str, rows_per_block: int = 2) -> Group:
    slots = tuple(Slot(slot, tensor.dtype, None, ()) for slot in ("param", *state))
    return Group(name, tuple(tensor.shape), slots, rows_per_block)


def fitted(**tensors: Tensor) -> LastSaved:
    last = LastSaved()
    last.fit(BlockMap(tuple(group_of(name, t) for name, t in tensors.items()), 8), [[t] for t in tensors.values()])
    return last


def record(last: LastSaved, name: str, live: Tensor, numbers: list[int], step: int) -> None:
    [group] = [group for group in last.map.groups if group.name == name]
    [staged] = stage(StagingBuffer(), [(group, [live], numbers)])
    last.record(staged, step)


def test_at_first_no_block_was_ever_saved() -> None:
    assert fitted(a=torch.ones(5, 1), b=torch.ones(2, 1)).steps.tolist() == [NEVER] * 4


def test_recorded_blocks_are_remembered_with_their_step_and_values() -> None:
    a, b = torch.arange(5.0).view(5, 1), torch.ones(3, 1)
    last = fitted(a=a, b=b)
    record(last, "a", a, [0, 1, 2], step=3)
    record(last, "b", b, [1], step=4)
    a += 10
    record(last, "a", a, [2], step=5)
    assert last.steps.tolist() == [3, 3, 5, NEVER, 4]
    assert last.values(last.map.groups[0]).flatten().tolist() == [0, 1, 2, 3, 14]


def test_the_copy_has_the_layout_of_the_live_tensor() -> None:
    live = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    last = fitted(a=live)
    record(last, "a", live, [0, 1], step=1)
    copy = last.values(last.map.groups[0])
    assert copy.stride() == live.stride()
    assert torch.equal(copy, live)


def test_adopted_values_take_the_layout_of_the_live_tensor() -> None:
    values = torch.randn(4, 3, 2, 2)
    live = values.to(memory_format=torch.channels_last)
    block_map = BlockMap((group_of("a", values),), 8)
    last = LastSaved()
    last.adopt(block_map, {"a": values}, {"a[0:2]": 4, "a[2:4]": 6})
    last.fit(block_map, [[live]])
    copy = last.values(block_map.groups[0])
    assert copy.stride() == live.stride()
    assert torch.equal(copy, values)


def test_what_is_known_of_unchanged_groups_survives_new_ones_in_front() -> None:
    a = torch.arange(4.0).view(4, 1)
    last = fitted(a=a)
    record(last, "a", a, [0, 1], step=7)
    new = torch.zeros(2, 1)
    last.fit(BlockMap((group_of("new", new), group_of("a", a)), 8), [[new], [a]])
    assert last.steps.tolist() == [NEVER, 7, 7]
    assert torch.equal(last.values(last.map.groups[1]), a)


def test_a_group_with_new_state_shape_or_dtype_counts_as_never_saved() -> None:
    a = torch.zeros(4, 1)
    for changed, state in [(a, ["exp_avg"]), (torch.zeros(6, 1), []), (a.double(), [])]:
        last = fitted(a=a)
        record(last, "a", a, [0, 1], step=7)
        last.fit(BlockMap((group_of("a", changed, *state),), 8), [[changed, *[changed for _ in state]]])
        assert set(last.steps.tolist()) == {NEVER}


def test_adopted_values_are_copies_since_the_loader_hands_its_tensors_on() -> None:
    a = torch.zeros(3, 1)
    last = LastSaved()
    last.adopt(BlockMap((group_of("a", a),), 8), {"a": a}, {"a[0:2]": 4, "a[2:3]": 6})
    a += 1
    assert last.values(last.map.groups[0]).sum() == 0
    assert last.steps.tolist() == [4, 6]


def test_forgotten_blocks_count_as_never_saved() -> None:
    a = torch.zeros(4, 1)
    last = fitted(a=a)
    record(last, "a", a, [0, 1], step=7)
    last.forget(["a[0:2]", "of another map[0:1]"])
    assert last.steps.tolist() == [NEVER, 7]


def test_a_0d_tensor_is_remembered_as_one_row() -> None:
    scalar = torch.tensor(3.0)
    last = LastSaved()
    last.fit(BlockMap((group_of("a", scalar),), 8), [[scalar]])
    record(last, "a", scalar.unsqueeze(0), [0], step=1)
    assert last.values(last.map.groups[0]).tolist() == [3.0]
