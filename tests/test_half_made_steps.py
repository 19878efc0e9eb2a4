"""Whether a step that failed has changed anything yet, whatever the optimizer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from lightning_scar.continuation.snapshot import Update, changes


class Lost(Exception):
    """The loss of a peer."""


class FailsBetween(Adam):
    """Changes the first parameter's state only, and then communicates."""

    def step(self, closure: Any = None) -> None:
        closure()
        self.state[self.param_groups[0]["params"][0]]["momentum"].add_(1)
        raise Lost


def fails_behind(optimizer: Optimizer) -> Optimizer:
    def lose(*args: Any) -> None:
        raise Lost

    optimizer.register_step_post_hook(lose)
    return optimizer


def of_its_own(parameters: list[nn.Parameter]) -> Optimizer:
    optimizer = FailsBetween(parameters)
    optimizer.state[parameters[0]]["momentum"] = torch.zeros(2)
    return optimizer


KINDS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "a hook behind the step": lambda p: fails_behind(SGD(p, 0.1)),
    "a hook behind a fused step": lambda p: fails_behind(Adam(p, 0.1, fused=True)),
    "an optimizer that communicates": of_its_own,
}


def step(optimizer: Optimizer, fails_early: bool = False) -> Update:
    parameters = optimizer.param_groups[0]["params"]
    update = Update(lambda: changes([optimizer]), check=lambda: None)

    def attempt(closure: Callable[[], Any]) -> None:
        def wrapped() -> Any:
            loss = closure()
            if fails_early:
                # As a hook between the gradients and the step.
                raise Lost
            return loss

        optimizer.step(wrapped)

    def closure() -> Any:
        loss = sum(parameter.square().sum() for parameter in parameters)
        loss.backward()  # type: ignore[union-attr]
        return loss

    with pytest.raises(Lost):
        update.attempt(attempt, closure)
    return update


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails_early", [True, False])
def test_a_step_is_half_made_once_something_has_changed(kind: str, fails_early: bool) -> None:
    optimizer = KINDS[kind]([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))])
    assert step(optimizer, fails_early).is_half_made is not fails_early


def test_a_forward_that_changes_weights_does_not_count() -> None:
    """As embeddings with a largest norm do."""
    parameter = nn.Parameter(torch.ones(2))
    update = Update(lambda: changes([SGD([parameter], 0.1)]), check=lambda: None)

    def fail(closure: Callable[[], Any]) -> None:
        closure()
        raise Lost

    with pytest.raises(Lost):
        update.attempt(fail, lambda: parameter.data.add_(1) + parameter.detach().mul_(0.5))
    assert not update.is_half_made
