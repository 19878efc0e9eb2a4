"""Splits a checkpoint into its large tensors and everything else, the skeleton."""

import copy
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, is_lazy

#: The place of a value in nested dicts, lists and tuples.
Path = tuple[str | int, ...]

#: Integer and boolean tensors up to this size are generator states, counters and the like: they belong to the
#: skeleton's step, and cannot turn NaN.
_SMALL_BYTES = 64 * 1024
#: The data types of optimizers' step counters.
_COUNTERS = (torch.float32, torch.float64, torch.int64)
#: Nearly all tensors are of these types, for which the slow questions about subclasses need not be asked.
_PLAIN = (Tensor, Parameter)
#: Most other values are of these types, and hold nothing.
_SCALARS = (int, float, bool, str)


class Leaf(NamedTuple):
    """A tensor of a checkpoint and its place in it."""

    path: Path
    tensor: Tensor


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that is equal for references to the same values, such as tied weights and views by ``detach``.

    What has no storage, such as sparse tensors, equals nothing but itself.

    Example::

        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> identity(weight) == identity(weight.detach()), identity(weight) == identity(weight.detach().clone())
        (True, False)

    """
    if (wrapper := wrapping(tensor)) is not None:
        return identity(wrapper.inner)
    if tensor.layout != torch.strided or (type(tensor) not in _PLAIN and is_lazy(tensor)):
        return "without storage", id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())


class Wrapper(NamedTuple):
    """A tensor subclass around one plain tensor of the same shape.

    Attributes:
        inner: The plain tensor.
        name: Its attribute.
        recipe: What else makes the wrapper: its class, and the arguments of ``__tensor_unflatten__`` behind the tensor.

    """

    inner: Tensor
    name: str
    recipe: tuple[Any, ...]


def wrapping(tensor: Tensor) -> Wrapper | None:
    """Return what is in a tensor subclass that wraps one plain tensor; ``None`` for anything else.

    Several inner tensors, such as codes and scales, must stay of one moment, so they are no blocks.
    """
    kind = type(tensor)
    if kind in _PLAIN:
        return None
    is_wrapper = hasattr(kind, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__")
    # The inner tensors of those differ between the ranks.
    if not is_wrapper or kind.__module__.startswith("torch.distributed"):
        return None
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    inner: Any = getattr(tensor, names[0]) if len(names) == 1 else None
    if type(inner) not in _PLAIN or inner.layout != torch.strided or inner.shape != tensor.shape:
        return None
    return Wrapper(inner, names[0], (kind, context, tuple(tensor.shape), tuple(tensor.stride())))


def held_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor, or of the indices and values of a sparse one, or of what a wrapper holds.

    Example::

        >>> held_bytes(torch.ones(3)), held_bytes(torch.eye(1000).to_sparse())
        (12, 20000)

    """
    if is_lazy(tensor):
        return 0
    if hasattr(tensor, "__tensor_unflatten__"):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return sum(held_bytes(getattr(tensor, name)) for name in names)
    if tensor.layout == torch.sparse_coo:
        return tensor._indices().nbytes + tensor._values().nbytes
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices().nbytes + tensor.col_indices().nbytes + tensor.values().nbytes
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices().nbytes + tensor.row_indices().nbytes + tensor.values().nbytes
    return tensor.numel() * tensor.dtype.itemsize


class Skeleton(TypedDict):
    """Everything but the large tensors.

    Attributes:
        tree: The nested containers, with ``None`` in place of removed tensors.
        wrapped: The places of wrappers whose inner tensors were removed, with attributes and recipes.
        counters: 0-d tensors, and all small tensors on an accelerator, with their places; tensors of one kind are
            stacked. Optimizers have one per parameter, which would be slow to pickle or transfer one by one.

    """

    tree: Any
    wrapped: list[tuple[Path, str, tuple[Any, ...]]]
    counters: list[tuple[list[Path], Tensor]]


def take_apart(value: Any, parameters: Mapping[tuple[Any, ...], Any]) -> tuple[Skeleton, list[Leaf]]:
    """Split a checkpoint into its skeleton and its large tensors.

    Args:
        value: Nested dicts, lists and tuples; anything else is a leaf.
        parameters: The identities of parameters, which always count as large.

    Returns:
        The skeleton, whose tree shares containers without tensors; and the large tensors, detached, in order.

    Example::

        >>> skeleton, leaves = take_apart({"state_dict": {"w": torch.ones(3)}, "lr": 0.1}, {})
        >>> skeleton["tree"], leaves[0].path
        ({'state_dict': {'w': None}, 'lr': 0.1}, ('state_dict', 'w'))

    """
    leaves: list[Leaf] = []
    counters: dict[tuple[Any, ...], list[Leaf]] = {}
    wrapped: list[tuple[Path, str, tuple[Any, ...]]] = []

    def visit(value: Any, path: Path) -> Any:
        if value is None or type(value) in _SCALARS:
            return value
        if isinstance(value, Tensor):
            wrapper = wrapping(value)
            if wrapper is not None and _is_large(wrapper.inner, parameters):
                wrapped.append((path, wrapper.name, wrapper.recipe))
                path, value = (*path, wrapper.name), wrapper.inner
            if _is_large(value, parameters):
                detached = value.detach()
                leaves.append(Leaf(path, detached if type(detached) is Tensor else detached.as_subclass(Tensor)))
            elif _is_counter(value):
                counters.setdefault((value.device, value.dtype, value.shape), []).append(Leaf(path, value.detach()))
            else:
                return value
            return None
        changed = {key: new for key, old in _items(value) if (new := visit(old, (*path, key))) is not old}
        return _replaced(value, changed) if changed else value

    tree = visit(value, ())
    return Skeleton(tree=tree, wrapped=wrapped, counters=[_stacked(found) for found in counters.values()]), leaves


def _stacked(counters: list[Leaf]) -> tuple[list[Path], Tensor]:
    return [leaf.path for leaf in counters], torch.stack([leaf.tensor for leaf in counters])


def put_together(skeleton: Skeleton, leaves: Mapping[Path, Tensor]) -> Any:
    """Rebuild a checkpoint; the inverse of :func:`take_apart`.

    Args:
        skeleton: The skeleton.
        leaves: The large tensors, by path; what is not among them stays ``None``.

    """
    counters = {
        path: value.clone() for paths, stack in skeleton["counters"] for path, value in zip(paths, stack, strict=True)
    }
    tensors = {**leaves, **counters}
    # Earlier versions did not take wrappers apart.
    for path, name, (kind, *rest) in skeleton.get("wrapped", ()):
        if (inner := tensors.get((*path, name))) is not None:
            tensors[path] = kind.__tensor_unflatten__({name: inner}, *rest)

    def visit(value: Any, path: Path) -> Any:
        if path in tensors:
            return tensors[path]
        changed = {key: new for key, old in _items(value) if (new := visit(old, (*path, key))) is not old}
        return _replaced(value, changed) if changed else value

    return visit(skeleton["tree"], ())


def heavy(value: Any, path: Path = ()) -> Iterator[Leaf]:
    """Yield the large tensors that are left in a skeleton's tree, because they cannot be cut into blocks."""
    if isinstance(value, Tensor) and held_bytes(value) > _SMALL_BYTES:
        yield Leaf(path, value)
    for key, item in _items(value):
        yield from heavy(item, (*path, key))


def _is_large(tensor: Tensor, parameters: Mapping[tuple[Any, ...], Any]) -> bool:
    # Subclasses with plain storage, such as quantized parameters of bitsandbytes, count as plain tensors.
    if type(tensor) not in _PLAIN and (hasattr(tensor, "__tensor_flatten__") or is_lazy(tensor)):
        return False
    if tensor.layout != torch.strided:
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
        # Other keys would be ambiguous in a path; their tensors stay in the skeleton.
        return ((key, item) for key, item in value.items() if isinstance(key, str | int))
    if isinstance(value, list | tuple):
        return iter(enumerate(value))
    return iter(())


def _replaced(container: Any, changed: dict[Any, Any]) -> Any:
    if isinstance(container, tuple):
        items = [changed.get(i, item) for i, item in enumerate(container)]
        return type(container)(*items) if hasattr(container, "_fields") else type(container)(items)
    # A copy keeps the class and its attributes, such as a state_dict's `_metadata`.
    copied = copy.copy(container)
    for key, item in changed.items():
        copied[key] = item
    return copied


def pack(content: dict[str, Any]) -> memoryview:
    """Pickle a skeleton with ``torch.save``."""
    buffer = BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def unpack(data: memoryview, weights_only: bool | None) -> dict[str, Any]:
    """Load a skeleton with ``torch.load``.

    Args:
        data: From :func:`pack`.
        weights_only: As in ``torch.load``; ``None`` is torch's default.

    Raises:
        pickle.UnpicklingError: If ``weights_only`` forbids an object in the skeleton.

    """
    content: dict[str, Any] = torch.load(BytesIO(data), map_location="cpu", weights_only=weights_only)
    return content
