"""Checks whether a checkpoint fits a model, and keeps the part that does."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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
    return [
        *(f"missing: {name}" for name in live if name not in saved),
        *(f"extra: {name}" for name in saved if name not in live),
        *(
            f"reshaped: {name} is {tuple(saved[name].shape)} in the checkpoint, {tuple(live[name].shape)} in the model"
            for name in _reshaped(saved, live)
        ),
    ]


def keep_what_fits(checkpoint: dict[str, Any], live: Mapping[str, Any]) -> None:
    """Drop from a checkpoint, in place, what does not fit a model.

    If parameters were added, dropped or reshaped, drop the optimizer states, too: torch pairs them by position, and a
    state with the wrong parameter is worse than none.

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


def check_fit(
    path: str, checkpoint: dict[str, Any], live: Mapping[str, Any], strict: bool, kinds: tuple[str, ...] = ("",)
) -> bool:
    """Check that a running checkpoint fits a model.

    Args:
        path: Its path.
        checkpoint: The checkpoint dict; unless ``strict``, what does not fit is dropped from it.
        live: The model's ``state_dict``.
        strict: Whether a difference is an error.
        kinds: The prefixes of the :func:`differences` that count.

    Returns:
        Whether it fits unchanged.

    Raises:
        ModelMismatchError: If it does not fit; the message lists every difference.

    """
    found = [difference for difference in differences(checkpoint["state_dict"], live) if difference.startswith(kinds)]
    if not found:
        return True
    listed = "\n  ".join(found)
    if strict:
        raise ModelMismatchError(
            f"{path} was written by another model:\n  {listed}\n"
            "Use another dirpath, or `strict=False` to load what fits."
        )
    warnings.warn(
        f"lightning-scar: {path} was written by another model; what fits is loaded, optimizer states are not:\n"
        f"  {listed}",
        stacklevel=2,
    )
    keep_what_fits(checkpoint, live)
    return False


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
    own = {name: (tuple(t.shape), t.dtype) for name, t in state_dict.items() if isinstance(t, Tensor)}
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


def _said(tensor: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if tensor is None else f"{tensor[0]} {str(tensor[1]).removeprefix('torch.')}"
