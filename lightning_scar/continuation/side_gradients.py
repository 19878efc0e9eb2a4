"""Gradients that are collected beside ``Parameter.grad``, and added in the backward pass of another batch."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn import Module, Parameter


class SideGradients:
    """The weighted sum of gradients that DDP does not see until they are added.

    Hooks take each gradient as soon as it is computed, so whatever the program does with ``grad`` behind a backward
    pass (clipping, ``zero_grad``) has no effect on it.

    Args:
        module: The model.

    Example::

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> side = SideGradients(model)
        >>> with side.collecting(weight=0.5):
        ...     model(torch.tensor([[4.0]])).sum().backward()
        >>> model.weight.grad is None
        True
        >>> with side.added(scale=10):
        ...     model(torch.tensor([[1.0]])).sum().backward()
        >>> model.weight.grad  # 10 * (0.5 * 4 + 1)
        tensor([[30.]])

    """

    def __init__(self, module: Module) -> None:
        self._module = module
        self._sums: dict[Parameter, Tensor] = {}
        self._is_added = False

    @property
    def _parameters(self) -> list[Parameter]:
        return [parameter for parameter in self._module.parameters() if parameter.requires_grad]

    @contextmanager
    def collecting(self, weight: float) -> Iterator[None]:
        """Add the gradients of the backward passes in this context, and leave ``grad`` as it is.

        Args:
            weight: Their factor; with 0 they are discarded.

        """
        parameters = self._parameters
        own = [parameter.grad for parameter in parameters]
        with ExitStack() as hooks:
            for parameter in parameters:
                parameter.grad = None
                take = partial(self._take, weight=weight)
                hook = parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
                hooks.callback(hook.remove)
            try:
                yield
            finally:
                for parameter, gradient in zip(parameters, own, strict=True):
                    parameter.grad = gradient

    def _take(self, parameter: Parameter, weight: float) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if weight:
            total = self._sums.get(parameter)
            self._sums[parameter] = gradient * weight if total is None else total.add_(gradient, alpha=weight)
        # Not `None`: the hooks of DDP come next, and find in it that the parameter is used.
        gradient.zero_()

    @contextmanager
    def added(self, scale: float) -> Iterator[None]:
        """Add what was collected to ``grad`` in the next backward pass, before DDP reduces it; then forget it.

        Args:
            scale: The factor of everything: what was collected, ``grad`` before, and the gradients of this pass.

        """
        self._is_added = False
        with ExitStack() as hooks:
            for parameter in self._parameters:
                hook = parameter.register_hook(partial(self._scaled, scale=scale))  # type: ignore[no-untyped-call]
                hooks.callback(hook.remove)
            try:
                yield
            finally:
                self._sums.clear()

    def _scaled(self, gradient: Tensor, scale: float) -> Tensor:
        if not self._is_added:
            # All at the first gradient: DDP reads then the `grad` of those parameters that this pass does not use.
            self._is_added = True
            self._add(scale)
        return gradient * scale

    @torch.no_grad()
    def _add(self, scale: float) -> None:
        for parameter in self._parameters:
            extra = self._sums.pop(parameter, None)
            if parameter.grad is not None:
                # In place, because it may be a view of a bucket of DDP.
                parameter.grad.add_(extra) if extra is not None else None
                parameter.grad.mul_(scale)
            elif extra is not None:
                parameter.grad = extra.mul_(scale)
