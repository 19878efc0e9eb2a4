"""Whether a checkpoint fits a model, and the part of it that does."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class ModelMismatchError(ValueError):
    """A running checkpoint was written by another model."""


def differences(saved: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    """What keeps a saved ``state_dict`` from fitting a live one, a line each.

    Args:
        saved: The saved ``state_dict``.
        live: The model's.

    Example::

        >>> import torch
        >>> differences({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(3), "c": torch.ones(1)})
        ['missing: c', 'extra: b', 'reshaped: a is (2,) in the checkpoint, (3,) in the model']

    """
    return [
        *(f"missing: {name}" for name in live if name not in saved),
        *(f"extra: {name}" for name in saved if name not in live),
        *(
            f"reshaped: {name} is {tuple(saved[name].shape)} in the checkpoint, {tuple(live[name].shape)} in the model"
            for name in _reshaped(saved, live)
        ),
    ]


def keep_what_fits(checkpoint: dict[str, Any], live: Mapping[str, Any]) -> None:
    """Drops from a checkpoint, in place, what does not fit a model.

    Optimizer states go too where parameters were added, dropped or reshaped: they are paired by position, and a state
    beside the wrong parameter is worse than none.

    Args:
        checkpoint: The checkpoint dict.
        live: The model's ``state_dict``.

    """
    saved = checkpoint["state_dict"]
    if not differences(saved, live):
        return
    reshaped = _reshaped(saved, live)
    checkpoint["state_dict"] = {name: value for name, value in saved.items() if name in live and name not in reshaped}
    checkpoint["optimizer_states"] = []


def _reshaped(saved: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, value in saved.items()
        if isinstance(value, Tensor) and isinstance(live.get(name), Tensor) and value.shape != live[name].shape
    ]
