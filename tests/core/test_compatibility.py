import torch

from lightning_scar.core.compatibility import differences


def test_equal_models_have_no_differences() -> None:
    saved = {"a": torch.ones(2), "extra_state": {"any": 1}}
    assert differences(saved, {"a": torch.zeros(2), "extra_state": {"other": 2}}) == []


def test_missing_extra_and_reshaped_tensors_are_all_listed() -> None:
    saved = {"same": torch.ones(1), "shape": torch.ones(2, 3), "gone": torch.ones(1)}
    live = {"same": torch.ones(1), "shape": torch.ones(3, 2), "new": torch.ones(1), "newer": torch.ones(1)}
    assert differences(saved, live) == [
        "missing: new",
        "missing: newer",
        "extra: gone",
        "reshaped: shape is (2, 3) in the checkpoint, (3, 2) in the model",
    ]


def test_another_dtype_is_no_difference_since_torch_converts_it() -> None:
    assert differences({"a": torch.ones(2)}, {"a": torch.ones(2, dtype=torch.bfloat16)}) == []


def test_what_has_no_shape_yet_has_no_other_one() -> None:
    assert differences({"a": torch.ones(2)}, {"a": torch.nn.LazyLinear(2).weight}) == []
