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
        #: The numbers of the parameters that a training step moves, as far as they are known; a replacement is told.
        self.moving: list[int] = []
        #: Numbers of frozen parameters that are watched in the present step, and some of their values at its beginning.
        self._watched: list[tuple[int, Tensor]] = []
        self._steps = 0

    def buffers(self) -> list[Tensor]:
        """Return the buffers that have elements."""
        buffers = (buffer.detach() for owner in self._owners for buffer in owner.buffers(recurse=False))
        return [buffer for buffer in buffers if buffer.numel()]

    def present(self) -> list[Tensor]:
        """Return all of them that are known."""
        return [*self.buffers(), *(self._parameters[number] for number in self.moving)]

    def begin_step(self) -> None:
        """Watch the frozen parameters, before a training step computes anything."""
        if self._steps < _WATCHED_STEPS:
            numbered = enumerate(self._parameters)
            frozen = ((number, p) for number, p in numbered if not (p.requires_grad or is_lazy(p)))
            self._watched = [(number, _some(parameter).clone()) for number, parameter in frozen]

    def end_step(self) -> None:
        """Note which parameters have moved, when the gradients are there."""
        self._steps += 1
        watched, self._watched = self._watched, []
        # By value, because a step may replace their data.
        moved = {number for number, before in watched if not torch.equal(_some(self._parameters[number]), before)}
        self.moving += sorted(moved.difference(self.moving))


def _some(parameter: Parameter) -> Tensor:
    return parameter.detach().reshape(-1)[:64]
