"""A snapshot of what a failed step has changed, so that the step can be repeated."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_scar.continuation.kept_batch import KeptBatch
from lightning_scar.continuation.metric_states import MetricStates
from lightning_scar.continuation.step_tensors import StepTensors


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


def changes(optimizers: Iterable[Optimizer]) -> int:
    """Return a number that grows with every change of parameters or of the state of their optimizers.

    Example::

        >>> parameter = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([parameter], lr=0.1)
        >>> before = changes([optimizer])
        >>> parameter.sum().backward()
        >>> changes([optimizer]) == before
        True
        >>> optimizer.step()
        >>> changes([optimizer]) > before
        True

    """
    return sum(_changes(optimizer) for optimizer in optimizers)


def _changes(optimizer: Optimizer) -> int:
    parameters: Iterable[Tensor] = (parameter for group in optimizer.param_groups for parameter in group["params"])
    if type(optimizer).__module__.startswith("torch.optim"):
        # These change all that have a gradient, or nothing. A fused one counts no changes of parameters, but its steps.
        parameters = itertools.islice((parameter for parameter in parameters if parameter.grad is not None), 1)
    total = len(optimizer.state)
    for parameter in parameters:
        total += parameter._version
        # A sharded optimizer may hold None for the parameters of other ranks.
        state = optimizer.state.get(parameter) or {}
        total += sum(value._version for value in state.values() if isinstance(value, Tensor))
    return total


class Update:
    """Knows whether an attempt of a step that failed has changed parameters: then it cannot be made again.

    Args:
        changes: See :func:`changes`.
        check: Raises an error if the gradients are garbage.

    """

    def __init__(self, changes: Callable[[], int], check: Callable[[], object]) -> None:
        self._changes = changes
        self._check = check
        #: What it was when the gradients were there; ``None`` before.
        self._before: int | None = None

    def attempt(self, attempt: Callable[[Callable[[], Any]], Any], closure: Callable[[], Any]) -> Any:
        """Make an attempt, given what computes the gradients and returns the loss. Return what it returned."""

        def noted() -> Any:
            loss = closure()
            self._check()
            self._before = self._changes()
            return loss

        self._before = None
        output = attempt(noted)
        self._before = None
        return output

    @property
    def is_half_made(self) -> bool:
        """Whether the last attempt has failed after it changed something."""
        return self._before is not None and self._before != self._changes()


class StepSnapshot:
    """What a forward and backward pass changes: buffers, metrics, logs, random generators, gradients, and its batch.

    Args:
        module: The model.
        keep_logs: Returns what undoes all that is logged from then on.

    """

    def __init__(self, module: Module, keep_logs: Callable[[], Callable[[], object]]) -> None:
        self._module = module
        #: What a training step changes in place.
        self.tensors = StepTensors(module)
        self._keep_logs = keep_logs
        self._undo_logs: Callable[[], object] = lambda: None
        self._metrics = MetricStates(module)
        self._batch = KeptBatch()
        self._buffers: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._gradients: list[Tensor | None] = []
        #: The :func:`random_state` that was saved.
        self.random: list[Any] = []

    def save(self, gradients: bool, batch: Any = None) -> None:
        """Copy the present values.

        Args:
            gradients: Whether to copy gradients of earlier micro-batches, too.
            batch: The batch.

        """
        self._metrics.save()
        self._batch.save(batch)
        self._undo_logs = self._keep_logs()
        self._buffers = self.tensors.present()
        self.tensors.begin_step()
        if [copy.shape for copy in self._copies] != [buffer.shape for buffer in self._buffers]:
            self._copies = [torch.empty_like(buffer) for buffer in self._buffers]
        if self._buffers:
            # One call for all: a model with batch normalization has hundreds of buffers.
            torch._foreach_copy_(self._copies, [buffer.detach() for buffer in self._buffers])
        self.random = random_state()
        self._gradients = [_clone(p.grad) for p in self._module.parameters()] if gradients else []

    @torch.no_grad()
    def restore(self, gradients: bool = True) -> None:
        """Restore the copied values.

        Args:
            gradients: Whether the gradients change, too; to ``None`` where none were copied.

        """
        self._metrics.restore()
        self._batch.restore()
        self._undo_logs()
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._copies)
        set_random_state(self.random)
        if not gradients:
            return
        parameters = list(self._module.parameters())
        for parameter, gradient in zip(parameters, self._gradients or [None] * len(parameters), strict=True):
            parameter.grad = _clone(gradient)


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
