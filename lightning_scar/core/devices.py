"""Work on tensors alongside the training: at once on a CPU, on a side stream of an accelerator.

A save must read tensors after one optimizer step and before the next. The Python program runs ahead of an accelerator,
so these moments are *marks* (events) on its streams. The training thread only records marks and lets its stream wait
for them; the thread itself never waits.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Queue(Protocol):
    """Queues the work of a save on one device, in order, alongside the work of the training."""

    def mark(self) -> Any:
        """Return a mark after all work that the calling thread has queued for the training."""

    def beside(self, work: Callable[[], None], after: Any) -> Any:
        """Queue work alongside the training.

        Args:
            work: Reads and writes tensors. Its results are ready when the returned mark is reached.
            after: The mark to begin after.

        Returns:
            A mark after the work.

        """

    def hold(self, mark: Any) -> None:
        """Let all training work that the calling thread queues from now on wait for a mark; return at once."""

    def wait(self, mark: Any) -> None:
        """Block until a mark is reached. Not for the training thread."""


class CPUQueue:
    """Does all work at once, in the calling thread."""

    def mark(self) -> None:
        """Return ``None``: all work is done already."""

    def beside(self, work: Callable[[], None], after: None) -> None:
        """Do the work."""
        work()

    def hold(self, mark: None) -> None:
        """Do nothing: all work is done already."""

    def wait(self, mark: None) -> None:
        """Do nothing: all work is done already."""


class AcceleratorQueue:
    """A side stream of an accelerator of any vendor.

    Args:
        device: The accelerator.

    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.Stream(device)

    def mark(self) -> torch.Event:
        """Record an event on the training's stream."""
        return self._record(torch.accelerator.current_stream(self._device))

    def beside(self, work: Callable[[], None], after: torch.Event) -> torch.Event:
        """Launch the work on the side stream."""
        training = torch.accelerator.current_stream(self._device)
        self._side.wait_event(after)
        torch.accelerator.set_stream(self._side)
        try:
            work()
            return self._record(self._side)
        finally:
            torch.accelerator.set_stream(training)

    def hold(self, mark: torch.Event) -> None:
        """Let the training's stream wait for the event."""
        torch.accelerator.current_stream(self._device).wait_event(mark)

    def wait(self, mark: torch.Event) -> None:
        """Block this thread until the event."""
        mark.synchronize()

    def _record(self, stream: torch.Stream) -> torch.Event:
        event = torch.Event(self._device)
        event.record(stream)
        return event


def queue_of(tensors: Sequence[Tensor]) -> Queue:
    """Return a queue for the accelerator that holds any of these tensors, else for the CPU."""
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    return CPUQueue() if device is None else AcceleratorQueue(device)


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy small tensors to the host: those of an accelerator in one non-blocking transfer.

    Args:
        tensors: Any dtypes and shapes. CPU tensors are returned unchanged; all others must be on one device.

    """
    away = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors if tensor.device.type != "cpu"]
    if not away:
        return list(tensors)
    # Padded to 16 bytes, so that a view of any data type is aligned.
    padded = [torch.nn.functional.pad(each, (0, -len(each) % 16)) for each in away]
    flat = torch.cat(padded)
    host = torch.empty(len(flat), dtype=torch.uint8, device="cpu", pin_memory=True).copy_(flat, non_blocking=True)
    copies = iter(torch.split(host, [len(each) for each in padded]))
    return [
        tensor if tensor.device.type == "cpu" else next(copies)[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor in tensors
    ]


class HostBuffer:
    """Host memory for the copies of one save, reused by later saves; pinned if an accelerator writes to it.

    Example::

        >>> buffer = HostBuffer()
        >>> buffer.take(100).shape
        torch.Size([100])

    """

    ALIGNMENT = 64

    def __init__(self) -> None:
        #: Whether an accelerator writes to it; set this before memory is taken.
        self.pinned = False
        self._slabs: list[Tensor] = []
        self._used = 0

    def reset(self) -> None:
        """Free all memory for reuse; pieces that were taken before are no longer valid."""
        if len(self._slabs) > 1:
            self._slabs = [self._slab(sum(slab.numel() for slab in self._slabs))]
        self._used = 0

    def reserve(self, nbytes: int) -> None:
        """Let the next pieces, ``nbytes`` in total, come from one allocation."""
        if self._slabs and self._used + nbytes <= self._slabs[-1].numel():
            return
        if self._slabs and not self._used:
            self._slabs.pop()
        # Slightly more, because the next save may need a few more bytes.
        self._slabs.append(self._slab(nbytes + nbytes // 64))
        self._used = 0

    def take(self, nbytes: int) -> Tensor:
        """Return a piece of the buffer: uint8, shape ``(nbytes,)``, aligned for any data type."""
        padded = -(-nbytes // self.ALIGNMENT) * self.ALIGNMENT
        self.reserve(padded)
        start, self._used = self._used, self._used + padded
        return self._slabs[-1][start : start + nbytes]

    def _slab(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.pinned)


class HostBuffers:
    """The buffers that saves use in turn.

    Args:
        count: How many saves may be waiting to be written.

    """

    def __init__(self, count: int) -> None:
        self._buffers = [HostBuffer() for _ in range(count)]

    def next(self) -> HostBuffer:
        """Return a buffer whose last save is written: the writer has a free place, and there is a buffer per place."""
        self._buffers[0].reset()
        return self._buffers[0]

    def keep(self, buffer: HostBuffer) -> None:
        """Put the buffer of a save that was handed to the writer last in the order."""
        self._buffers.sort(key=lambda each: each is buffer)
