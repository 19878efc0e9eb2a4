"""The buffers of a model, such as running statistics, where several batches of a step are computed in one process."""

from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_scar.continuation.protocol import Training
from lightning_scar.continuation.step_tensors import StepTensors


class SharedBuffers:
    """The buffers behind which a step's last batch comes. DDP gives all workers those of rank 0. A collective.

    Args:
        training: The training.
        tensors: What a training step changes in place.

    """

    def __init__(self, training: Training, tensors: StepTensors) -> None:
        self._buffers = tensors.present()
        self._are_shared = any(wrapper.broadcast_buffers for wrapper in training.wrappers())
        if self._are_shared:
            _broadcast(tensors.buffers())
        self._beginning = self._copies()
        self._of_slot_0: list[Tensor] | None = None

    def set(self, values: list[Tensor]) -> None:
        """Set the buffers to those of another moment."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, values)

    def restore(self, of_slot_0: bool = False) -> None:
        """Restore the buffers, behind a batch of another worker.

        Args:
            of_slot_0: Whether it was one of slot 0, whose buffers all will have behind the step.

        """
        if of_slot_0 and self._are_shared:
            self._of_slot_0 = self._copies()
        self.set(self._beginning)

    def end(self) -> None:
        """Set the buffers as they are behind the step, if this worker has computed them."""
        if self._of_slot_0 is not None:
            self.set(self._of_slot_0)

    def have_changed(self) -> bool:
        """Return whether a buffer is different from the beginning."""
        return not all(map(torch.equal, self._buffers, self._beginning))

    def _copies(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self._buffers]


def _broadcast(buffers: list[Tensor]) -> None:
    # In few collectives: a model with batch normalization has hundreds of buffers.
    def kind(buffer: Tensor) -> tuple[str, str]:
        return str(buffer.dtype), str(buffer.device)

    for _, group in groupby(sorted(buffers, key=kind), key=kind):
        alike = list(group)
        values = torch.cat([buffer.reshape(-1) for buffer in alike])
        dist.broadcast(values, 0)
        parts = torch.split(values, [buffer.numel() for buffer in alike])
        torch._foreach_copy_(alike, [part.view_as(buffer) for part, buffer in zip(parts, alike, strict=True)])
