from typing import Any
from unittest.mock import patch

import pytest
import torch
from core_helpers import Training, assert_same, round_trip, rows_of, saved_steps
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from lightning_scar.core import live_state
from lightning_scar.core.blocks import BlockMap, build_map, rows
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings
from lightning_scar.core.skeleton import take_apart

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.complex128, torch.float8_e4m3fn])
SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)
TENSORS = st.builds(torch.zeros, SHAPES, dtype=DTYPES)
STATES = st.dictionaries(st.text("ab/.[:]", min_size=1, max_size=4), TENSORS, min_size=1, max_size=5)
SIZES = st.integers(1, 300)


def map_of(checkpoint: Any, block_size: int | None = None, training: Training | None = None) -> BlockMap:
    _, leaves = take_apart(checkpoint, {})
    optimizers = {} if training is None else dict(enumerate(training.optimizers))
    states = {("optimizer_states", i): (o, checkpoint["optimizer_states"][i]) for i, o in optimizers.items()}
    parameters = [] if training is None else training.model.parameters()
    return build_map(leaves, states, parameters, block_size)


def keys(block_map: BlockMap) -> list[str]:
    return [group.key(i) for group in block_map.groups for i in range(len(group))]


def slots(block_map: BlockMap, name: str) -> list[str]:
    [group] = [group for group in block_map.groups if group.name == name]
    return [slot.name for slot in group.slots]


def adam_training() -> Training:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    training = Training(model, optim.Adam(model.parameters()))
    training.step()
    return training


# -- properties ------------------------------------------------------------------------------------------------------


@given(STATES, SIZES)
def test_blocks_partition_the_rows_of_every_tensor_exactly(state: dict[str, Tensor], size: int) -> None:
    for group in map_of(state, size).groups:
        spans = [group.span(i) for i in range(len(group))]
        assert [row for start, stop in spans for row in range(start, stop)] == list(range(group.rows))
        assert all(start < stop for start, stop in spans)


@given(STATES, SIZES)
def test_every_key_is_unique_and_names_its_rows(state: dict[str, Tensor], size: int) -> None:
    block_map = map_of(state, size)
    assert len(set(keys(block_map))) == len(block_map)
    for group in block_map.groups:
        for i in range(len(group)):
            assert rows_of(group.key(i)) == slice(*group.span(i))


@given(STATES, SIZES)
def test_a_block_is_as_large_as_the_block_size_allows_but_holds_at_least_one_row(
    state: dict[str, Tensor], size: int
) -> None:
    for group in map_of(state, size).groups:
        row = group.row_numel * group.slots[0].dtype.itemsize
        assert group.rows_per_block == 1 or group.rows_per_block * row <= size
        assert (group.rows_per_block + 1) * row > size


@given(STATES, SIZES)
def test_the_map_counts_every_byte_once(state: dict[str, Tensor], size: int) -> None:
    block_map = map_of(state, size)
    assert block_map.state_bytes == sum(tensor.nbytes for tensor in state.values())
    assert len(block_map.nbytes) == len(block_map) == block_map.offsets[-1]


@given(STATES, SIZES)
def test_a_block_is_found_by_its_number_and_by_its_key(state: dict[str, Tensor], size: int) -> None:
    block_map = map_of(state, size)
    for number, key in enumerate(keys(block_map)):
        group, i = block_map.locate(number)
        assert block_map.groups[group].key(i) == key
        assert block_map.numbers[key] == number


@given(STATES, SIZES)
def test_the_map_depends_on_names_shapes_and_the_block_size_only(state: dict[str, Tensor], size: int) -> None:
    others = {name: torch.full_like(tensor, 1) for name, tensor in state.items()}
    assert map_of(others, size) == map_of(state, size)


@given(STATES, STATES, SIZES)
def test_blocks_keep_their_rows_when_other_tensors_come_and_go(
    state: dict[str, Tensor], others: dict[str, Tensor], size: int
) -> None:
    alone = {group.name: group for group in map_of({"state": state}, size).groups}
    among = {group.name: group for group in map_of({"others": others, "state": state}, size).groups}
    assert alone.items() <= among.items()


# -- which tensors share a block -------------------------------------------------------------------------------------


def test_optimizer_state_of_the_parameters_shape_shares_its_block() -> None:
    training = adam_training()
    block_map = map_of(training.checkpoint(), None, training)
    assert slots(block_map, "state_dict/0.weight") == ["param", "exp_avg", "exp_avg_sq"]
    assert not [group.name for group in block_map.groups if group.name.startswith("optimizer_states")]


def test_optimizer_state_of_another_shape_gets_blocks_of_its_own() -> None:
    model = nn.Linear(4, 3)
    training = Training(model, optim.Adafactor(model.parameters()))
    training.step()
    block_map = map_of(training.checkpoint(), None, training)
    assert slots(block_map, "state_dict/weight") == ["param"]
    assert slots(block_map, "state_dict/bias") == ["param", "variance"]
    shapes = {group.name: group.shape for group in block_map.groups}
    assert shapes["optimizer_states/0/state/state_dict/weight/row_var"] == (3, 1)
    assert shapes["optimizer_states/0/state/state_dict/weight/col_var"] == (1, 4)


def test_tied_weights_are_one_group_with_all_their_places() -> None:
    shared = torch.ones(2, 3)
    block_map = map_of({"state_dict": {"encoder": shared, "decoder": shared.detach()}})
    [group] = block_map.groups
    assert group.slots[0].paths == (("state_dict", "encoder"), ("state_dict", "decoder"))


def test_a_parameter_of_two_optimizers_keeps_the_state_of_both() -> None:
    model = nn.Linear(4, 3, bias=False)
    training = Training(model, optim.Adam(model.parameters()), optim.Adam(model.parameters()))
    training.step()
    block_map = map_of(training.checkpoint(), None, training)
    [group] = block_map.groups
    assert [slot.paths[0][1] for slot in group.slots[1:]] == [0, 0, 1, 1]
    assert len({slot.name for slot in group.slots}) == 5


def test_optimizer_state_keeps_its_names_when_parameters_are_added_in_front() -> None:
    model = nn.Linear(4, 3, bias=False)
    extra = nn.Parameter(torch.ones(2))
    before = Training(model, optim.Adafactor(model.parameters()))
    before.step()
    model.extra = extra
    after = Training(model, optim.Adafactor([extra, *before.model.parameters()][:2]))
    after.step()
    old, new = (map_of(t.checkpoint(), None, t).groups for t in (before, after))
    assert {group.name: group.shape for group in old}.items() <= {group.name: group.shape for group in new}.items()


def test_state_that_is_not_written_as_torch_writes_it_becomes_blocks_of_its_own() -> None:
    training = adam_training()
    checkpoint = training.checkpoint()
    checkpoint["optimizer_states"][0] = {"flat_moments": torch.ones(30)}
    block_map = map_of(checkpoint, None, training)
    assert slots(block_map, "state_dict/0.weight") == ["param"]
    assert slots(block_map, "optimizer_states/0/flat_moments") == ["param"]


def test_parameters_and_their_state_are_lazy_and_buffers_are_not() -> None:
    training = adam_training()
    lazy = {group.name for group in map_of(training.checkpoint(), None, training).groups if group.lazy}
    assert lazy == {f"state_dict/{name}" for name, _ in training.model.named_parameters()}


def test_weight_averages_in_callback_state_are_blocks_too() -> None:
    training = adam_training()
    checkpoint = {**training.checkpoint(), "callbacks": {"EMA": {"average": {"0.weight": torch.ones(3, 4)}}}}
    assert slots(map_of(checkpoint, None, training), "callbacks/EMA/average/0.weight") == ["param"]


@pytest.mark.parametrize(
    "alike",
    [{1: torch.zeros(2), "1": torch.ones(2)}, {"a/b": torch.zeros(2), "a": {"b": torch.ones(2)}}],
    ids=["number and text", "slash and nest"],
)
def test_places_that_read_alike_are_not_mixed_up(memory_url: str, alike: dict[Any, Any]) -> None:
    assert_same(round_trip(memory_url, alike), alike)


# -- layout and size -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "stride"),
    [
        (torch.zeros(2, 3), None),
        (torch.zeros(3, 2).t(), (1, 2)),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), (60, 1, 15, 3)),
        (torch.zeros(4, 6)[:, ::2], None),
        (torch.zeros(3).expand(2, 3), None),
    ],
    ids=["contiguous", "transposed", "channels last", "with gaps", "expanded"],
)
def test_dense_layouts_are_remembered_and_others_become_contiguous(tensor: Tensor, stride: Any) -> None:
    assert map_of({"x": tensor}).groups[0].slots[0].stride == stride


def test_the_automatic_size_aims_at_four_thousand_blocks_within_its_bounds() -> None:
    def size(gib: float) -> int:
        return map_of({"x": torch.empty(int(gib * 2**20), 1024, dtype=torch.uint8).view(torch.float8_e5m2)}).block_size

    assert size(1 / 2**20) == 4 * 1024
    assert size(1 / 8) == 2**27 // 4096


def test_an_element_of_a_0d_tensor_is_its_one_row() -> None:
    scalar = torch.tensor(2.0)
    assert rows(scalar).shape == (1,)
    assert rows(scalar).data_ptr() == scalar.data_ptr()
    matrix = torch.ones(2, 2)
    assert rows(matrix) is matrix


def test_a_state_without_large_tensors_has_an_empty_map() -> None:
    block_map = map_of({"step": 3})
    assert (len(block_map), block_map.state_bytes, block_map.nbytes.tolist()) == (0, 0, [])


# -- cost ------------------------------------------------------------------------------------------------------------


def test_the_map_is_built_once_for_many_saves_and_again_when_state_appears(memory_url: str) -> None:
    model = nn.Linear(4, 3)
    training = Training(model, optim.Adam(model.parameters()))
    with (
        RunningCheckpoint(memory_url, Settings(fraction=1.0)) as running,
        patch.object(live_state, "build_map", wraps=build_map) as counted,
    ):
        training.save(running)
        assert counted.call_count == 1
        for _ in range(5):
            training.step()
            training.save(running)
        assert counted.call_count == 2
    assert set(saved_steps(memory_url).values()) == {5}


def test_the_automatic_size_is_that_of_the_parameters_whatever_else_a_rank_has() -> None:
    model = nn.Linear(512, 512)
    sizes = set()
    for extra in ({}, {"callbacks": {"average": torch.zeros(4096, 4096)}}):
        leaves = take_apart({"state_dict": model.state_dict(), **extra}, {})[1]
        sizes.add(build_map(leaves, {}, model.parameters(), None).block_size)
    assert len(sizes) == 1
