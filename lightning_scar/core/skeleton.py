"""A checkpoint taken apart: its large tensors on one side, everything else, the skeleton, on the other."""

import copy
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Where a value sits in nested dicts, lists and tuples.
Path = tuple[str | int, ...]

#: Integer and boolean tensors up to here are states of random generators, counters and the like: they belong to the
#: step that the skeleton stands for, and cannot turn NaN.
_SMALL_BYTES = 64 * 1024


class Leaf(NamedTuple):
    """A tensor of a checkpoint and its place in it."""

    path: Path
    tensor: Tensor


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """What two references to the same values have in common; tied weights share it, and so do views by ``detach``.

    Example::

        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> identity(weight) == identity(weight.detach()), identity(weight) == identity(weight.detach().clone())
        (True, False)

    """
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())


def take_apart(value: Any, parameters: Mapping[tuple[Any, ...], Any]) -> tuple[Any, list[Leaf]]:
    """Splits a checkpoint into its skeleton's tree and its large tensors.

    Args:
        value: Nested dicts, lists and tuples; anything else is a leaf.
        parameters: The identities of parameters: these are never small.

    Returns:
        A copy of the nest with ``None`` where a tensor was taken out (containers without one are not copied), and the
        tensors, detached, in order.

    Example::

        >>> tree, leaves = take_apart({"state_dict": {"w": torch.ones(3)}, "step": torch.tensor(1.0)}, {})
        >>> tree, leaves[0].path
        ({'state_dict': {'w': None}, 'step': tensor(1.)}, ('state_dict', 'w'))

    """
    leaves: list[Leaf] = []

    def visit(value: Any, path: Path) -> Any:
        if isinstance(value, Tensor):
            if not _is_large(value, parameters):
                return value
            leaves.append(Leaf(path, value.detach()))
            return None
        changed = {key: new for key, old in _items(value) if (new := visit(old, (*path, key))) is not old}
        return _replaced(value, changed) if changed else value

    return visit(value, ()), leaves


def put_together(tree: Any, leaves: Mapping[Path, Tensor]) -> Any:
    """The inverse of :func:`take_apart`.

    Args:
        tree: What :func:`take_apart` left.
        leaves: The tensor for each path.

    """

    def visit(value: Any, path: Path) -> Any:
        if path in leaves:
            return leaves[path]
        changed = {key: new for key, old in _items(value) if (new := visit(old, (*path, key))) is not old}
        return _replaced(value, changed) if changed else value

    return visit(tree, ())


def _is_large(tensor: Tensor, parameters: Mapping[tuple[Any, ...], Any]) -> bool:
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) or tensor.layout != torch.strided:
        return False
    if tensor.numel() == 0 or tensor.is_quantized or tensor.is_meta or tensor.is_conj() or tensor.is_neg():
        return False
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.dim() > 0 or identity(tensor) in parameters
    return tensor.nbytes > _SMALL_BYTES


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        # Other keys could not be told apart in a path; their tensors ride in the skeleton.
        return ((key, item) for key, item in value.items() if isinstance(key, str | int))
    if isinstance(value, list | tuple):
        return iter(enumerate(value))
    return iter(())


def _replaced(container: Any, changed: dict[Any, Any]) -> Any:
    if isinstance(container, tuple):
        items = [changed.get(i, item) for i, item in enumerate(container)]
        return type(container)(*items) if hasattr(container, "_fields") else type(container)(items)
    # Keeps the class, and what hangs on it: a state_dict's `_metadata`.
    copied = copy.copy(container)
    for key, item in changed.items():
        copied[key] = item
    return copied


def pack(content: dict[str, Any]) -> memoryview:
    """Pickles a skeleton as ``torch.save`` does."""
    buffer = BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def unpack(data: memoryview, weights_only: bool | None) -> dict[str, Any]:
    """Loads a skeleton as ``torch.load`` does.

    Args:
        data: What :func:`pack` made.
        weights_only: As in ``torch.load``; ``None`` is torch's default.

    Raises:
        pickle.UnpicklingError: If ``weights_only`` forbids something that the skeleton holds.

    """
    content: dict[str, Any] = torch.load(BytesIO(data), map_location="cpu", weights_only=weights_only)
    return content
