"""Weights that a training step moves by itself are known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_scar.continuation.step_tensors import StepTensors


class Encoder(nn.Module):
    """One layer is trained, another one follows it, and a third one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(4, 4)
        self.follows = nn.Linear(4, 4).requires_grad_(False)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def replaced(weight: Tensor, by: Tensor) -> None:
    weight.data = weight.data * 0.9 + by.data * 0.1


def in_place(weight: Tensor, by: Tensor) -> None:
    with torch.no_grad():
        weight.lerp_(by, 0.1)


def in_its_data(weight: Tensor, by: Tensor) -> None:
    weight.data.mul_(0.9).add_(0.1 * by.data)


@pytest.mark.parametrize("move", [replaced, in_place, in_its_data])
def test_it_does_not_matter_how_they_are_moved(move: Callable[[Tensor, Tensor], None]) -> None:
    model = Encoder()
    model.follows.load_state_dict(model.trained.state_dict())
    tensors = StepTensors(model)
    for _ in range(3):
        tensors.begin_step()
        # In the first step they are the same.
        move(model.follows.weight, model.trained.weight)
        tensors.end_step()
        with torch.no_grad():
            model.trained.weight += 0.1
    (found,) = tensors.present()
    assert found is model.follows.weight


def test_what_is_loaded_between_two_steps_has_not_moved() -> None:
    model = Encoder()
    tensors = StepTensors(model)
    for _ in range(3):
        tensors.begin_step()
        tensors.end_step()
        nn.init.normal_(model.frozen.weight)
    assert tensors.present() == []
