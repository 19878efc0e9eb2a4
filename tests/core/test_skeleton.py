import pickle
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from core_helpers import assert_same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_scar.core.skeleton import Leaf, identity, pack, put_together, take_apart, unpack

TENSORS = st.sampled_from(
    [
        torch.ones(2),
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.tensor(1.0),
        torch.tensor(True),
        torch.zeros(0),
        torch.arange(20_000),
    ]
)
LEAVES = st.one_of(st.none(), st.integers(), st.text(max_size=3), TENSORS)
KEYS = st.one_of(st.text(max_size=3), st.integers(-2, 2))
NESTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=12,
)


class Pair(NamedTuple):
    left: Any
    right: Any


def nothing_large_is_left(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 or value.numel() == 0
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return all(nothing_large_is_left(item) for item in items)


@given(NESTS)
def test_what_is_taken_apart_is_put_together_again(nest: Any) -> None:
    skeleton, leaves = take_apart(nest, {})
    assert nothing_large_is_left(skeleton["tree"])
    assert len({leaf.path for leaf in leaves}) == len(leaves)
    assert_same(put_together(skeleton, dict(leaves)), nest)


@given(NESTS)
def test_taking_apart_leaves_the_original_alone(nest: Any) -> None:
    before = pickle.dumps(nest)
    take_apart(nest, {})
    assert pickle.dumps(nest) == before


def test_leaves_are_the_live_tensors_themselves_but_detached() -> None:
    weight = nn.Parameter(torch.ones(2))
    _, [leaf] = take_apart({"w": weight}, {})
    assert leaf.path == ("w",)
    assert not leaf.tensor.requires_grad
    assert identity(leaf.tensor) == identity(weight)


def test_version_counters_are_shared_with_the_live_tensor() -> None:
    weight = nn.Parameter(torch.ones(2))
    _, [leaf] = take_apart({"w": weight}, {})
    before = leaf.tensor._version
    with torch.no_grad():
        weight.add_(1)
    assert leaf.tensor._version > before


def test_containers_without_tensors_are_not_copied() -> None:
    callbacks = {"EarlyStopping": {"patience": [3]}}
    skeleton, _ = take_apart({"callbacks": callbacks, "w": torch.ones(2)}, {})
    assert skeleton["tree"]["callbacks"] is callbacks


def test_named_tuples_and_the_metadata_of_state_dicts_survive() -> None:
    state = nn.Linear(2, 2).state_dict()
    skeleton, leaves = take_apart({"state_dict": state, "pair": Pair(torch.ones(2), 1)}, {})
    whole = put_together(skeleton, dict(leaves))
    assert isinstance(whole["pair"], Pair)
    assert type(whole["state_dict"]) is OrderedDict
    assert whole["state_dict"]._metadata == state._metadata


@pytest.mark.parametrize(
    "small",
    [
        torch.tensor(3.0, requires_grad=True),
        torch.tensor(3, dtype=torch.int8),
        torch.zeros(0, 4),
        torch.get_rng_state(),
        torch.zeros(64 * 1024, dtype=torch.bool),
        torch.sparse_coo_tensor([[0]], [1.0], (5,)),
        torch.ones(3, device="meta"),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.ones(3, dtype=torch.complex64).conj(),
    ],
    ids=["0-d with gradient", "0-d int8", "empty", "rng", "64 KiB bool", "sparse", "meta", "quantized", "conjugated"],
)
def test_small_and_unusual_tensors_ride_in_the_skeleton(small: Tensor) -> None:
    skeleton, leaves = take_apart({"x": small}, {})
    assert leaves == []
    assert skeleton["tree"]["x"] is small


def test_the_step_counters_of_an_optimizer_ride_together() -> None:
    state = {i: {"step": torch.tensor(float(i)), "count": torch.tensor(i)} for i in range(3)}
    skeleton, leaves = take_apart(state, {})
    assert leaves == []
    assert [stack.tolist() for _, stack in skeleton["counters"]] == [[0.0, 1.0, 2.0], [0, 1, 2]]
    whole = put_together(skeleton, {})
    assert_same(whole, state)
    whole[0]["step"] += 7
    assert whole[1]["step"] == 1


def test_large_integer_tensors_are_taken_out() -> None:
    _, leaves = take_apart({"x": torch.zeros(64 * 1024 + 1, dtype=torch.bool)}, {})
    assert [leaf.path for leaf in leaves] == [("x",)]


def test_a_scalar_parameter_is_taken_out_although_other_scalars_are_not() -> None:
    scale = nn.Parameter(torch.tensor(2.0))
    skeleton, leaves = take_apart({"scale": scale, "step": torch.tensor(2.0)}, {identity(scale): True})
    assert [leaf.path for leaf in leaves] == [("scale",)]
    assert skeleton["tree"] == {"scale": None, "step": None}


def test_a_subclass_that_is_a_plain_tensor_underneath_is_taken_out_as_one() -> None:
    class Marked(Tensor):
        pass

    marked = torch.ones(3).as_subclass(Marked)
    skeleton, [leaf] = take_apart([marked], {})
    assert skeleton["tree"] == [None]
    assert type(leaf.tensor) is Tensor
    assert leaf.tensor.data_ptr() == marked.data_ptr()


def test_a_subclass_that_wraps_other_tensors_stays_in_the_skeleton_with_its_class() -> None:
    class Wrapping(Tensor):
        def __tensor_flatten__(self) -> None: ...

    wrapping = torch.ones(3).as_subclass(Wrapping)
    skeleton, leaves = take_apart([wrapping], {})
    assert leaves == []
    assert skeleton["tree"][0] is wrapping


def test_tied_weights_and_detached_views_share_their_identity_and_clones_do_not() -> None:
    weight = torch.ones(2, 3)
    assert identity(weight) == identity(weight.detach())
    assert identity(weight) != identity(weight.clone())
    assert identity(weight) != identity(weight.view(3, 2))
    assert identity(weight) != identity(weight[:1])
    square = torch.ones(3, 3)
    assert identity(square) != identity(square.t())


def test_packing_keeps_everything_that_torch_save_keeps() -> None:
    content = {"tree": {"rng": torch.get_rng_state(), "lr": 0.1}, "groups": [("a", (2,), [("param", None)])]}
    assert_same(unpack(memoryview(bytes(pack(content))), weights_only=True), content)


def test_weights_only_refuses_what_it_refuses_in_torch() -> None:
    packed = pack({"tree": Pair(1, 2)})
    with pytest.raises(pickle.UnpicklingError):
        unpack(packed, weights_only=True)
    assert unpack(packed, weights_only=False)["tree"] == Pair(1, 2)


def test_a_leaf_pairs_a_path_with_a_tensor() -> None:
    tensor = torch.ones(1)
    assert dict([Leaf(("a", 0), tensor)]) == {("a", 0): tensor}
