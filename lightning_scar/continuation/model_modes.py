"""What a training changes in its model besides tensors: frozen parameters, and modules in evaluation mode."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import Module, Parameter


def modes(module: Module) -> Any:
    """Return which parameters are frozen, and which modules are in evaluation mode."""
    frozen = [parameter.requires_grad for parameter in module.parameters()]
    return frozen, [each.training for each in module.modules()]


def set_modes(module: Module, present: Any) -> None:
    """Set what :func:`modes` returned for the same model in another process."""
    requires_grad, are_training = present
    for parameter, is_trained in zip(module.parameters(), requires_grad, strict=True):
        parameter.requires_grad_(is_trained)
    for each, is_training in zip(module.modules(), are_training, strict=True):
        each.training = is_training


def trained(module: Module) -> list[Parameter]:
    """Return the parameters that are not frozen."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@contextmanager
def unfrozen(parameters: Iterable[Parameter]) -> Iterator[None]:
    """Return a context in which none of these parameters is frozen.

    DDP takes those for good that are not frozen when it wraps a model. One that was wrapped before may have been frozen
    since then, and may be trained again.

    Example::

        >>> import torch
        >>> layer = torch.nn.Linear(1, 1).requires_grad_(False)
        >>> with unfrozen([layer.weight]):
        ...     [parameter.requires_grad for parameter in layer.parameters()]
        [True, False]
        >>> layer.weight.requires_grad
        False

    """
    present = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter, _ in present:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, is_trained in present:
            parameter.requires_grad_(is_trained)
