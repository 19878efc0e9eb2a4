"""Lets a model load what was saved of it, as the model itself wants to, and explains what it did not take."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from lightning_scar.core.compatibility import ModelMismatchError, differences
from lightning_scar.core.private import complaints
from lightning_scar.core.skeleton import identity

#: Makes a module load a ``state_dict``; leniently, if the last argument says so.
Load = Callable[[Module, Mapping[str, Any], bool], Any]


def load_model(
    path: str, modules: Mapping[str, Module], saved: Mapping[str, Any], strict: bool, load: Load | None = None
) -> bool:
    """Let a model load a ``state_dict``: its hooks, overridden methods and lazy modules may make it fit.

    Args:
        path: The path of the checkpoint, for messages.
        modules: The model, by ``""``; or its parts, by the prefixes of their names in the ``state_dict``.
        saved: The ``state_dict``.
        strict: Whether it is an error if torch, or the model, refuses a part of it. Otherwise what fits is loaded, and
            a warning says what was not.
        load: How a module loads one; by default with its own ``load_state_dict``.

    Returns:
        Whether all of it was loaded.

    Raises:
        ModelMismatchError: If it was refused, with a list of all differences; or if nothing was loaded.

    Example::

        >>> model = torch.nn.Linear(2, 1)
        >>> load_model("runs/a/scar", {"": model}, {"weight": torch.ones(1, 2)}, strict=True)
        Traceback (most recent call last):
        ...
        lightning_scar.core.compatibility.ModelMismatchError: runs/a/scar was written by another model:
          missing: bias
        Use another dirpath, or `strict=False` to load what fits.

    """
    found = [f"extra: {name}" for name in saved if not name.startswith(tuple(modules))]
    cause: Exception | None = None
    took_nothing = []
    for prefix, module in modules.items():
        part, before = _part(saved, prefix), _marks(module)
        lines, error = _load_one(path, module, part, load or _load, strict)
        found += [line.replace(": ", f": {prefix}", 1) for line in lines]
        cause = cause or error
        took_nothing.append(_has_tensors(part) and bool(before) and _marks(module) == before)
        if took_nothing[-1] and not lines:
            _refuse_nothing(path, found, None)
    if strict and found:
        raise ModelMismatchError(
            f"{path} was written by another model:{_listed(found)}\n"
            "Use another dirpath, or `strict=False` to load what fits."
        ) from cause
    if all(took_nothing):
        _refuse_nothing(path, found, cause)
    if found:
        count = sum(len(module.state_dict()) for module in modules.values())
        lost = sum(not line.startswith("extra: ") for line in found)
        warnings.warn(
            f"lightning-scar: {path} was written by another model: {count - lost} of the present one's {count} tensors "
            f"were loaded, the others keep their initial values:{_listed(found)}",
            stacklevel=2,
        )
    return not found


def _refuse_nothing(path: str, found: list[str], cause: Exception | None) -> None:
    raise ModelMismatchError(
        f"nothing of {path} was loaded: no tensor of the model has changed, so training would begin anew. Use another "
        f"dirpath, or a model that takes what was saved.{_listed(found)}"
    ) from cause


def _listed(lines: list[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)


def _load_one(
    path: str, module: Module, saved: Mapping[str, Any], load: Load, strict: bool
) -> tuple[list[str], Exception | None]:
    """Load one module; return what was not loaded, and the error that says so."""
    with _ends_of_loading(module) as ends:
        try:
            load(module, saved, False)
        except RuntimeError as error:
            lines = complaints(error) or differences(saved, module.state_dict())
            if not lines:
                raise
            # Torch complains when it has loaded what fits. A method of the model's own may not have come so far.
            return lines if strict or ends else _load_what_fits(path, module, saved, load), error
    return [], None


def _load(module: Module, saved: Mapping[str, Any], leniently: bool) -> None:
    module.load_state_dict(saved, strict=not leniently)


def _load_what_fits(path: str, module: Module, saved: Mapping[str, Any], load: Load) -> list[str]:
    found = differences(saved, module.state_dict())
    reshaped = {line.removeprefix("reshaped: ").split(" is ")[0] for line in found if line.startswith("reshaped: ")}
    try:
        load(module, {name: value for name, value in saved.items() if name not in reshaped}, True)
    except RuntimeError as error:
        listed = _listed(complaints(error) or found)
        raise ModelMismatchError(
            f"{path} was written by another model, and this one does not load a part of it:{listed}\nUse another "
            "dirpath, or let the model's load_state_dict pass `strict` on."
        ) from error
    return found


def _part(saved: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """Return the part of a ``state_dict`` whose names have a prefix, without it, and with torch's metadata."""
    if not prefix:
        return saved
    part = OrderedDict((name.removeprefix(prefix), saved[name]) for name in saved if name.startswith(prefix))
    metadata = getattr(saved, "_metadata", {})
    own = {f"{name}.".removeprefix(prefix)[:-1]: metadata[name] for name in metadata if f"{name}.".startswith(prefix)}
    vars(part)["_metadata"] = own
    return part


@contextmanager
def _ends_of_loading(module: Module) -> Iterator[list[Any]]:
    """Collect an item each time that torch has gone through a whole module."""
    ends: list[Any] = []
    handle = module.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
        lambda module, keys: ends.append(keys)
    )
    try:
        yield ends
    finally:
        handle.remove()


def _has_tensors(saved: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Tensor) and not name.endswith("_extra_state") for name, value in saved.items())


def _marks(module: Module) -> list[Any]:
    """Return what changes when a tensor of a module is loaded, in whatever way."""
    return [_mark(tensor) for tensor in chain(module.parameters(), module.buffers())]


def _mark(tensor: Tensor) -> Any:
    if is_lazy(tensor):
        return identity(tensor)
    version = None if tensor.is_inference() else tensor._version
    # Writes to `.data` leave the version as it was.
    is_plain = type(tensor.data) is Tensor and tensor.layout == torch.strided and not tensor.is_meta
    first = tensor.detach()[(0,) * tensor.dim()].item() if is_plain and tensor.numel() else None
    return identity(tensor), version, first
