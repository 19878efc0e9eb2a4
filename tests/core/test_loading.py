"""When the last test here fails after an upgrade of torch, look at ``complaints`` in ``core/private.py``."""

import pytest
import torch
from torch import nn

from lightning_scar.core.loading import load_model
from lightning_scar.core.private import complaints


def test_the_metadata_of_a_part_reach_its_modules() -> None:
    class Versioned(nn.Linear):
        _version = 3

        def _load_from_state_dict(
            self, state_dict: object, prefix: str, metadata: dict[str, int], *args: object
        ) -> None:
            seen.append(metadata.get("version"))
            super()._load_from_state_dict(state_dict, prefix, metadata, *args)  # type: ignore[arg-type]

    seen: list[int | None] = []
    parts = {"a": nn.Sequential(Versioned(1, 1)), "b": Versioned(1, 1)}
    saved = nn.ModuleDict(parts).state_dict()
    assert load_model("here", {f"{name}.": part for name, part in parts.items()}, saved, strict=True)
    assert seen == [3, 3]


def test_another_error_of_the_models_own_is_let_through() -> None:
    class OutOfMemory(nn.Linear):
        def load_state_dict(self, *args: object, **options: object) -> None:  # type: ignore[override]
            raise RuntimeError("no memory left")

    model = OutOfMemory(1, 1)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="no memory left"):
            load_model("here", {"": model}, model.state_dict(), strict=strict)


def test_a_model_that_never_loads_leniently_is_told_so() -> None:
    class Always(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner = nn.Linear(width, 1)

        def load_state_dict(self, state_dict: dict[str, torch.Tensor], *args: object, **options: object) -> None:  # type: ignore[override]
            self.inner.load_state_dict({name.removeprefix("inner."): value for name, value in state_dict.items()})

    with pytest.raises(
        ValueError, match=r"does not load a part of it:\n  missing: weight\nUse another dirpath, or let"
    ):
        load_model("here", {"": Always(2)}, Always(3).state_dict(), strict=False)


def test_a_state_of_extra_states_only_may_change_no_tensor() -> None:
    class Counting(nn.Linear):
        def set_extra_state(self, state: torch.Tensor) -> None: ...
        def get_extra_state(self) -> torch.Tensor:
            return torch.ones(1)

        def load_state_dict(self, state_dict: object, strict: bool = True, assign: bool = False) -> object:
            return super().load_state_dict(state_dict, strict=False)  # type: ignore[arg-type]

    assert load_model("here", {"": Counting(1, 1)}, {"_extra_state": torch.ones(3)}, strict=True)


def test_complaints() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    saved = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(()), "odd: name": torch.ones(1), "x": torch.ones(1)}
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(saved)
    assert complaints(error.value) == [  # type: ignore[arg-type]
        "missing: 1.weight",
        "missing: 1.bias",
        "extra: odd: name",
        "extra: x",
        "reshaped: 0.weight is (3, 2) in the checkpoint, (1, 2) in the model",
        "reshaped: 0.bias is () in the checkpoint, (1,) in the model",
    ]
    with pytest.raises(RuntimeError) as error:
        nn.Linear(1, 1).load_state_dict({"weight": 3, "bias": torch.ones(1)})
    assert complaints(error.value)[0].startswith('refused: While copying the parameter named "weight"')  # type: ignore[arg-type]
    assert complaints(RuntimeError("of something else")) == []
