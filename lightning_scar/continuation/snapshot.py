"""A snapshot of what a failed step has changed, so that the step can be repeated."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module


def random_state() -> list[Any]:
    """Return the state of torch's random generators in this process."""
    # Uninitialized CUDA has drawn nothing, and `torch.cuda.is_available` is slower than all the rest.
    uses_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.default_generator.get_state(), torch.cuda.get_rng_state() if uses_cuda else None]


def set_random_state(state: list[Any]) -> None:
    """Restore what :func:`random_state` returned."""
    cpu, device = state
    torch.set_rng_state(cpu)
    if device is not None:
        torch.cuda.set_rng_state(device)


class StepSnapshot:
    """Copies of what a forward and backward pass changes: buffers, random generators, gradients.

    Args:
        module: The model.

    """

    def __init__(self, module: Module | None = None) -> None:
        self._module = module
        # Once, because a walk over all modules of a deep model takes longer than the copies.
        modules = module.modules() if module is not None else ()
        self._owners = [owner for owner in modules if any(True for _ in owner.buffers(recurse=False))]
        self._buffers: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._gradients: list[Tensor | None] = []
        self._random: list[Any] = []

    def save(self, gradients: bool) -> None:
        """Copy the present values.

        Args:
            gradients: Whether to copy gradients of earlier micro-batches, too.

        """
        assert self._module is not None
        buffers = (buffer for owner in self._owners for buffer in owner.buffers(recurse=False))
        self._buffers = [buffer for buffer in buffers if buffer.numel()]
        if [copy.shape for copy in self._copies] != [buffer.shape for buffer in self._buffers]:
            self._copies = [torch.empty_like(buffer) for buffer in self._buffers]
        if self._buffers:
            # One call for all: a model with batch normalization has hundreds of buffers.
            torch._foreach_copy_(self._copies, [buffer.detach() for buffer in self._buffers])
        self._random = random_state()
        self._gradients = [_clone(p.grad) for p in self._module.parameters()] if gradients else []

    @torch.no_grad()
    def restore(self, gradients: bool = True) -> None:
        """Restore the copied values.

        Args:
            gradients: Whether the gradients change, too; to ``None`` where none were copied.

        """
        assert self._module is not None
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._copies)
        set_random_state(self._random)
        if not gradients:
            return
        parameters = list(self._module.parameters())
        for parameter, gradient in zip(parameters, self._gradients or [None] * len(parameters), strict=True):
            parameter.grad = _clone(gradient)


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
