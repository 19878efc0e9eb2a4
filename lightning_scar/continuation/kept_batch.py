"""A batch as it was before a training step that changes it: which takes a key out of it, or normalizes it in place."""

import warnings
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor


class KeptBatch:
    """What it takes to compute a batch again.

    Containers are copied. Tensors are if those of an earlier batch were changed in place, and for the first batch.

    Example::

        >>> batch = {"x": torch.ones(2), "y": torch.zeros(2)}
        >>> kept = KeptBatch()
        >>> kept.save(batch)
        >>> batch.pop("x").mul_(5)
        tensor([5., 5.])
        >>> kept.restore()
        >>> batch
        {'x': tensor([1., 1.]), 'y': tensor([0., 0.])}

    """

    def __init__(self) -> None:
        self._copies_tensors = True
        self._are_changed = False
        self._undo: list[Callable[[], None]] = []
        #: The tensors, their versions, and copies of them.
        self._tensors: list[tuple[Tensor, int, Tensor | None]] = []
        self._known: set[int] = set()

    def save(self, batch: Any) -> None:
        """Keep a batch."""
        if self._tensors:
            self._are_changed |= any(tensor._version != version for tensor, version, _ in self._tensors)
            self._copies_tensors = self._are_changed
        self._undo, self._tensors, self._known = [], [], set()
        self._keep(batch)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the batch back, in place, as it was."""
        for undo in self._undo:
            undo()
        for tensor, version, copy in self._tensors:
            if copy is not None:
                tensor.copy_(copy)
            elif tensor._version != version:
                warnings.warn(
                    "lightning-scar: the training step changes its batch in place, but did not before, so a step that "
                    "is made again has another batch. Change a copy of the batch.",
                    stacklevel=2,
                )
        self._tensors = [(tensor, tensor._version, copy) for tensor, _, copy in self._tensors]

    def _keep(self, value: Any) -> None:
        if isinstance(value, Tensor):
            copy = value.detach().clone() if self._copies_tensors else None
            self._tensors.append((value, value._version, copy))
        elif id(value) not in self._known:
            self._known.add(id(value))
            self._keep_container(value)

    def _keep_container(self, value: Any) -> None:
        if isinstance(value, list):
            items = [*value]
            self._undo.append(lambda: value.__setitem__(slice(None), items))
        elif isinstance(value, tuple):
            items = [*value]
        elif isinstance(value, dict):
            content = {**value}
            self._undo.append(lambda: _set(value, content))
            items = [*content.values()]
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            content = {**vars(value)}
            self._undo.append(lambda: _set(vars(value), content))
            items = [*content.values()]
        else:
            return
        for item in items:
            if not isinstance(item, str | bytes | int | float):
                self._keep(item)


def _set(mapping: MutableMapping[Any, Any], content: dict[Any, Any]) -> None:
    mapping.clear()
    mapping.update(content)
