import torch

from lightning_scar.core.compatibility import differences, keep_what_fits


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


def test_what_does_not_fit_is_dropped_with_the_optimizer_states() -> None:
    kept = torch.ones(1)
    checkpoint = {
        "state_dict": {"same": kept, "shape": torch.ones(2), "gone": torch.ones(1)},
        "optimizer_states": [{"state": {}}],
        "global_step": 3,
    }
    keep_what_fits(checkpoint, {"same": torch.zeros(1), "shape": torch.ones(3)})
    assert checkpoint == {"state_dict": {"same": kept}, "optimizer_states": [], "global_step": 3}


def test_a_checkpoint_that_fits_keeps_everything() -> None:
    checkpoint = {"state_dict": {"a": torch.ones(1)}, "optimizer_states": [{"state": {}}]}
    before = dict(checkpoint)
    keep_what_fits(checkpoint, {"a": torch.zeros(1)})
    assert checkpoint == before
    assert checkpoint["state_dict"] is before["state_dict"]


def test_what_was_dropped_loads_into_the_model_it_was_cut_for() -> None:
    model = torch.nn.Linear(2, 3)
    checkpoint = {"state_dict": torch.nn.Linear(4, 3).state_dict(), "optimizer_states": [{"state": {}}]}
    bias = checkpoint["state_dict"]["bias"]
    keep_what_fits(checkpoint, model.state_dict())
    model.load_state_dict(checkpoint["state_dict"], strict=False)
    assert torch.equal(model.bias, bias)
