"""Work on tensors beside the training: at once on a CPU, on a side stream of an accelerator.

A save has to read tensors behind one optimizer step and before the next. On an accelerator neither is a moment of the
Python program, which runs ahead of the device: *marks* on its streams are. The training thread only leaves marks and
has its stream wait for them; it never waits itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Queue(Protocol):
    """Where the work of a save on one device is queued, in order, beside what the training queues there."""

    def mark(self) -> Any:
        """A mark behind all that the calling thread has queued for the training."""

    def beside(self, work: Callable[[], None], after: Any) -> Any:
        """Queues work beside the training.

        Args:
            work: Reads and writes tensors. Its results are there once the mark that this returns is reached.
            after: The mark that it must not begin before.

        Returns:
            A mark behind the work.

        """

    def hold(self, mark: Any) -> None:
        """Keeps what the calling thread queues for the training from now on behind a mark; returns at once."""

    def wait(self, mark: Any) -> None:
        """Returns when a mark is reached. Not for the training thread."""


class CPUQueue:
    """Does everything at once, in the thread that asks for it."""

    def mark(self) -> None:
        """All that was queued is done."""

    def beside(self, work: Callable[[], None], after: None) -> None:
        """Does the work."""
        work()

    def hold(self, mark: None) -> None:
        """Nothing is on its way."""

    def wait(self, mark: None) -> None:
        """Nothing is on its way."""


class AcceleratorQueue:
    """A side stream of an accelerator, whichever vendor's.

    Args:
        device: Which one.

    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.Stream(device)

    def mark(self) -> torch.Event:
        """An event on the training's stream."""
        return self._record(torch.accelerator.current_stream(self._device))

    def beside(self, work: Callable[[], None], after: torch.Event) -> torch.Event:
        """Launches the work on the side stream."""
        training = torch.accelerator.current_stream(self._device)
        self._side.wait_event(after)
        torch.accelerator.set_stream(self._side)
        try:
            work()
            return self._record(self._side)
        finally:
            torch.accelerator.set_stream(training)

    def hold(self, mark: torch.Event) -> None:
        """The training's stream waits for the event."""
        torch.accelerator.current_stream(self._device).wait_event(mark)

    def wait(self, mark: torch.Event) -> None:
        """Waits for the event in this thread."""
        mark.synchronize()

    def _record(self, stream: torch.Stream) -> torch.Event:
        event = torch.Event(self._device)
        event.record(stream)
        return event


def queue_of(tensors: Sequence[Tensor]) -> Queue:
    """The queue of the accelerator that any of these tensors lies on; else that of the CPU."""
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
    return CPUQueue() if device is None else AcceleratorQueue(device)


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Small tensors on the host, those of an accelerator in one transfer, which is only launched.

    Args:
        tensors: Any dtypes and shapes; those on the CPU are returned as they are. All others lie on one device.

    """
    away = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors if tensor.device.type != "cpu"]
    if not away:
        return list(tensors)
    # At multiples of 16 bytes, whatever the data type.
    padded = [torch.nn.functional.pad(each, (0, -len(each) % 16)) for each in away]
    flat = torch.cat(padded)
    host = torch.empty(len(flat), dtype=torch.uint8, pin_memory=True).copy_(flat, non_blocking=True)
    copies = iter(torch.split(host, [len(each) for each in padded]))
    return [
        tensor if tensor.device.type == "cpu" else next(copies)[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor in tensors
    ]


class HostBuffer:
    """Host memory that one save is copied to, reused by later saves: page-locked where an accelerator writes to it.

    Example::

        >>> buffer = HostBuffer()
        >>> buffer.take(100).shape
        torch.Size([100])

    """

    ALIGNMENT = 64

    def __init__(self) -> None:
        #: Whether an accelerator writes to it; to be said before memory is taken.
        self.pinned = False
        self._slabs: list[Tensor] = []
        self._used = 0

    def reset(self) -> None:
        """Makes all memory free again; what was taken before must not be used any more."""
        if len(self._slabs) > 1:
            self._slabs = [self._slab(sum(slab.numel() for slab in self._slabs))]
        self._used = 0

    def reserve(self, nbytes: int) -> None:
        """Makes sure that the next pieces, of so many bytes in all, come from one stretch of memory."""
        if self._slabs and self._used + nbytes <= self._slabs[-1].numel():
            return
        if self._slabs and not self._used:
            self._slabs.pop()
        # A little more than asked for: the next save may need a few bytes more.
        self._slabs.append(self._slab(nbytes + nbytes // 64))
        self._used = 0

    def take(self, nbytes: int) -> Tensor:
        """A piece of the buffer: uint8, shape ``(nbytes,)``, aligned for any data type."""
        padded = -(-nbytes // self.ALIGNMENT) * self.ALIGNMENT
        self.reserve(padded)
        start, self._used = self._used, self._used + padded
        return self._slabs[-1][start : start + nbytes]

    def _slab(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.pinned)


class HostBuffers:
    """The buffers that saves take turns with.

    Args:
        count: How many saves may be on their way to the disk.

    """

    def __init__(self, count: int) -> None:
        self._buffers = [HostBuffer() for _ in range(count)]

    def next(self) -> HostBuffer:
        """The buffer whose last save is written: there are as many as the writer has places, and it has a free one."""
        self._buffers[0].reset()
        return self._buffers[0]

    def keep(self, buffer: HostBuffer) -> None:
        """A save is handed over to the writer; its buffer comes last now."""
        self._buffers.sort(key=lambda each: each is buffer)
