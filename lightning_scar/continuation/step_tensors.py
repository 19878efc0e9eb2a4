"""The tensors of a model that a training step changes in place."""

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy

#: A step that moves weights by itself does so in one of its first few.
_WATCHED_STEPS = 3


class StepTensors:
    """Buffers, and frozen parameters that a training step moves by itself, as it does those of a momentum encoder.

    Args:
        module: The model.

    Example::

        >>> model = torch.nn.Linear(2, 1).requires_grad_(False)
        >>> tensors = StepTensors(model)
        >>> tensors.begin_step()
        >>> model.bias += 1
        >>> tensors.end_step()
        >>> [tensor is model.bias for tensor in tensors.present()]
        [True]

    """

    def __init__(self, module: Module) -> None:
        # Once, because a walk over all modules of a deep model takes long.
        self._owners = [owner for owner in module.modules() if any(True for _ in owner.buffers(recurse=False))]
        self._parameters = list(module.parameters())
        self._moving: list[Tensor] = []
        #: Frozen parameters that are watched in the present step, and some of their values at its beginning.
        self._watched: list[tuple[Parameter, Tensor]] = []
        self._steps = 0

    def buffers(self) -> list[Tensor]:
        """Return the buffers that have elements."""
        buffers = (buffer.detach() for owner in self._owners for buffer in owner.buffers(recurse=False))
        return [buffer for buffer in buffers if buffer.numel()]

    def present(self) -> list[Tensor]:
        """Return all of them; a replacement does not know all at once."""
        return [*self.buffers(), *self._moving]

    def begin_step(self) -> None:
        """Watch the frozen parameters, before a training step computes anything."""
        if self._steps < _WATCHED_STEPS:
            frozen = (p for p in self._parameters if not (p.requires_grad or is_lazy(p)))
            self._watched = [(parameter, _some(parameter).clone()) for parameter in frozen]

    def end_step(self) -> None:
        """Note which parameters have moved, when the gradients are there."""
        self._steps += 1
        watched, self._watched = self._watched, []
        # By value, because a step may replace their data.
        moved = [parameter for parameter, before in watched if not torch.equal(_some(parameter), before)]
        self._moving += [parameter for parameter in moved if not any(parameter is other for other in self._moving)]


def _some(parameter: Parameter) -> Tensor:
    return parameter.detach().reshape(-1)[:64]
