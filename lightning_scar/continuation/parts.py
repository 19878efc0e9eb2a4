"""Whose batches each survivor computes besides its own, whole or in slices."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_flatten


class Part(NamedTuple):
    """A part of the batches that a missing worker has in a step.

    Attributes:
        slot: The slot of the missing worker.
        number: Which part, from 0.
        of: The number of equal parts.

    """

    slot: int
    number: int
    of: int


def deal(members: Sequence[int], world_size: int, is_sliced: bool) -> dict[int, list[Part]]:
    """Deal the missing workers' batches out over the present ones.

    Args:
        members: The slots of the workers that are present, in order.
        world_size: The number of slots.
        is_sliced: Whether each member computes a part of each batch. Otherwise it computes whole ones.

    Returns:
        By slot of a member, what it computes besides its own batches. The batches of slot 0, whose buffers count, go to
        the first member if they are whole.

    Example::

        >>> deal([1, 2], world_size=4, is_sliced=False)
        {1: [Part(slot=0, number=0, of=1)], 2: [Part(slot=3, number=0, of=1)]}
        >>> deal([0, 1], world_size=3, is_sliced=True)
        {0: [Part(slot=2, number=0, of=2)], 1: [Part(slot=2, number=1, of=2)]}

    """
    size = len(members)
    missing = [slot for slot in range(world_size) if slot not in members]
    if is_sliced:
        # The larger slices of a batch that is not divisible go to other members each time.
        return {
            member: [Part(slot, (i + j) % size, size) for j, slot in enumerate(missing)]
            for i, member in enumerate(members)
        }
    return {member: [Part(slot, 0, 1) for slot in missing[i::size]] for i, member in enumerate(members)}


class NotSliceableError(ValueError):
    """A batch has no common first dimension."""


def size_of(batch: Any) -> int:
    """Return the number of samples in a batch: the first dimension of its first tensor.

    Raises:
        NotSliceableError: If it has no tensor with a dimension.

    """
    for leaf in tree_flatten(batch)[0]:
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    raise NotSliceableError("no tensor in the batch has a first dimension")


def part_of(batch: Any, number: int, of: int) -> tuple[Any, float]:
    """Return one of several equal parts of a batch, along the first dimension of all its tensors.

    Args:
        batch: Tensors, and lists of plain values, one for each sample, in tuples, lists and mappings. Other plain
            values, and tensors without dimensions, are the same for all samples.
        number: Which part, from 0.
        of: The number of parts.

    Returns:
        The part, and its share of the samples, from 0 to 1. Some parts are empty if there are more than samples.

    Raises:
        NotSliceableError: If the batch has no such form.

    Example::

        >>> import torch
        >>> part_of({"x": torch.arange(4), "name": ["a", "b", "c", "d"]}, number=1, of=2)
        ({'x': tensor([2, 3]), 'name': ['c', 'd']}, 0.5)

    """
    if of == 1:
        return batch, 1.0
    size = size_of(batch)
    samples = slice(size * number // of, size * (number + 1) // of)
    return _slice(batch, samples, size), (samples.stop - samples.start) / size if size else 0.0


def _slice(value: Any, samples: slice, size: int) -> Any:
    if isinstance(value, Tensor):
        if value.dim() and len(value) != size:
            raise NotSliceableError(f"a tensor of shape {tuple(value.shape)} is in a batch of {size} samples")
        return value[samples] if value.dim() else value
    if isinstance(value, Mapping):
        parts = {key: _slice(each, samples, size) for key, each in value.items()}
        return parts if type(value) is dict else type(value)(parts)  # type: ignore[call-arg]
    if isinstance(value, tuple | list):
        if len(value) == size and all(_is_plain(each) for each in value):
            return value[samples]
        inner = [_slice(each, samples, size) for each in value]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    if _is_plain(value):
        return value
    raise NotSliceableError(f"the batch contains a {type(value).__name__}")


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | bytes | int | float)
