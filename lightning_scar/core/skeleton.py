"""A checkpoint taken apart: its large tensors on one side, everything else, the skeleton, on the other."""

import copy
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

#: Where a value sits in nested dicts, lists and tuples.
Path = tuple[str | int, ...]

#: Integer and boolean tensors up to here are states of random generators, counters and the like: they belong to the
#: step that the skeleton stands for, and cannot turn NaN.
_SMALL_BYTES = 64 * 1024
#: What optimizers count their steps in.
_COUNTERS = (torch.float32, torch.float64, torch.int64)


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


class Skeleton(TypedDict):
    """Everything but the large tensors.

    Attributes:
        tree: The nest, with ``None`` where a tensor was taken out.
        counters: Its 0-d tensors, and all small ones of an accelerator, those of one kind stacked, with their places.
            An optimizer has one for each parameter; pickled or transferred one by one, they would take longer than all
            the rest.

    """

    tree: Any
    counters: list[tuple[list[Path], Tensor]]


def take_apart(value: Any, parameters: Mapping[tuple[Any, ...], Any]) -> tuple[Skeleton, list[Leaf]]:
    """Splits a checkpoint into its skeleton and its large tensors.

    Args:
        value: Nested dicts, lists and tuples; anything else is a leaf.
        parameters: The identities of parameters: these are never small.

    Returns:
        The skeleton, whose tree shares the containers without a tensor; and the large tensors, detached, in order.

    Example::

        >>> skeleton, leaves = take_apart({"state_dict": {"w": torch.ones(3)}, "lr": 0.1}, {})
        >>> skeleton["tree"], leaves[0].path
        ({'state_dict': {'w': None}, 'lr': 0.1}, ('state_dict', 'w'))

    """
    leaves: list[Leaf] = []
    counters: dict[tuple[Any, ...], list[Leaf]] = {}

    def visit(value: Any, path: Path) -> Any:
        if isinstance(value, Tensor):
            if _is_large(value, parameters):
                leaves.append(Leaf(path, value.detach().as_subclass(Tensor)))
            elif _is_counter(value):
                counters.setdefault((value.device, value.dtype, value.shape), []).append(Leaf(path, value.detach()))
            else:
                return value
            return None
        changed = {key: new for key, old in _items(value) if (new := visit(old, (*path, key))) is not old}
        return _replaced(value, changed) if changed else value

    tree = visit(value, ())
    return Skeleton(tree=tree, counters=[_stacked(found) for found in counters.values()]), leaves


def _stacked(counters: list[Leaf]) -> tuple[list[Path], Tensor]:
    return [leaf.path for leaf in counters], torch.stack([leaf.tensor for leaf in counters])


def put_together(skeleton: Skeleton, leaves: Mapping[Path, Tensor]) -> Any:
    """The inverse of :func:`take_apart`.

    Args:
        skeleton: What :func:`take_apart` left.
        leaves: The tensor for each path.

    """
    counters = {
        path: value.clone() for paths, stack in skeleton["counters"] for path, value in zip(paths, stack, strict=True)
    }
    tensors = {**leaves, **counters}

    def visit(value: Any, path: Path) -> Any:
        if path in tensors:
            return tensors[path]
        changed = {key: new for key, old in _items(value) if (new := visit(old, (*path, key))) is not old}
        return _replaced(value, changed) if changed else value

    return visit(skeleton["tree"], ())


def heavy(value: Any, path: Path = ()) -> Iterator[Leaf]:
    """The tensors of a skeleton's tree that are no small ones: of kinds that cannot be cut into blocks."""
    if isinstance(value, Tensor) and value.numel() * value.dtype.itemsize > _SMALL_BYTES:
        yield Leaf(path, value)
    for key, item in _items(value):
        yield from heavy(item, (*path, key))


def _is_large(tensor: Tensor, parameters: Mapping[tuple[Any, ...], Any]) -> bool:
    # A subclass that is a plain tensor underneath, such as a quantized parameter of bitsandbytes, is one for a save.
    is_wrapper = hasattr(tensor, "__tensor_flatten__")
    if is_wrapper or is_lazy(tensor) or tensor.layout != torch.strided:
        return False
    if tensor.numel() == 0 or tensor.is_quantized or tensor.is_meta or tensor.is_conj() or tensor.is_neg():
        return False
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.dim() > 0 or identity(tensor) in parameters
    return tensor.nbytes > _SMALL_BYTES


def _is_counter(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.requires_grad or tensor.is_meta:
        return False
    return tensor.device.type != "cpu" or (tensor.dim() == 0 and tensor.dtype in _COUNTERS)


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
