"""The differences between a checkpoint and a model, and between the models of the ranks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_scar.core.ranks import Ranks


class ModelMismatchError(ValueError):
    """A running checkpoint was saved from another model."""


def differences(saved: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    """Return the differences between a saved ``state_dict`` and a live one, one line each.

    Args:
        saved: The saved ``state_dict``.
        live: The model's.

    Example::

        >>> import torch
        >>> differences({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(3), "c": torch.ones(1)})
        ['missing: c', 'extra: b', 'reshaped: a is (2,) in the checkpoint, (3,) in the model']

    """
    lines = [f"missing: {name}" for name in live if name not in saved]
    lines += [f"extra: {name}" for name in saved if name not in live]
    for name, value in saved.items():
        before, now = _shape(value), _shape(live.get(name))
        if None not in (before, now) and before != now:
            lines.append(f"reshaped: {name} is {before} in the checkpoint, {now} in the model")
    return lines


def _shape(value: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor; ``None`` of what has none, or none yet."""
    return tuple(value.shape) if isinstance(value, Tensor) and not is_lazy(value) else None


def check_ranks_agree(ranks: Ranks, state_dict: Mapping[str, Any]) -> None:
    """Check that all ranks have the same model. A collective.

    Args:
        ranks: The ranks.
        state_dict: The ``state_dict`` of this rank's model.

    Raises:
        ModelMismatchError: If they differ; the message names the first tensor that does.

    """
    if ranks.world_size == 1:
        return
    own = {name: (_shape(t), t.dtype) for name, t in state_dict.items() if isinstance(t, Tensor)}
    first, *others = ranks.gather(own)
    for rank, other in enumerate(others, start=1):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                raise ModelMismatchError(
                    f"the ranks disagree on the model: {name} is {_said(first.get(name))} on rank 0 and "
                    f"{_said(other.get(name))} on rank {rank}. Build the same model on all ranks."
                )
        if list(first) != list(other):
            name = next(a for a, b in zip(first, other, strict=True) if a != b)
            raise ModelMismatchError(
                f"the ranks disagree on the order of the model's tensors, from {name} on (rank 0 and rank {rank}). "
                "Build the same model on all ranks."
            )


def _said(tensor: tuple[tuple[int, ...] | None, torch.dtype] | None) -> str:
    return "missing" if tensor is None else f"{tensor[0]} {str(tensor[1]).removeprefix('torch.')}"
