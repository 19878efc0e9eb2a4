"""The states of each worker's random generators where a step begins, kept where others of its host find them.

Who computes a dead worker's batch, or takes its place, then draws the numbers that it would have drawn.
"""

import mmap
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_scar.continuation.snapshot import set_random_state
from lightning_scar.elastic.worker.state_folder import in_memory

#: A record begins with its step, and the bytes of torch's state on the CPU and on CUDA. It ends with a checksum.
_HEAD, _CHECKSUM = struct.Struct("<qII"), struct.Struct("<I")
#: Bytes of a record. A file has two, by turns, so that one is whole whenever its writer is killed.
_RECORD = 8 << 10


class StepGenerators:
    """What :func:`~lightning_scar.continuation.snapshot.random_state` was in each slot's last two steps.

    Each slot of this host has a file in the job's memory, which outlives its process. Without a supervisor, or without
    room for it, nothing is known.

    Args:
        slot: This worker's.

    Example::

        >>> from lightning_scar.continuation.snapshot import random_state
        >>> generators = StepGenerators(slot=1)
        >>> generators.note(7, random_state())
        >>> generators.of(0, step=7) is None
        True

    """

    def __init__(self, slot: int) -> None:
        self._slot = slot
        #: What is open for writing, by slot; ``None`` where there is no room.
        self._files: dict[int, mmap.mmap | None] = {}
        self._begun = -1
        #: The last note.
        self._last: tuple[int, int, list[Any]] = (slot, -1, [None, None])

    def begin(self, step: int, state: list[Any]) -> None:
        """Note with which state this worker begins a step. Only that of the step's first batch counts.

        Args:
            step: The number of steps that are completed.
            state: From :func:`~lightning_scar.continuation.snapshot.random_state`.

        """
        if step != self._begun:
            self._begun = step
            self.note(step, state)

    def note(self, step: int, state: list[Any], slot: int | None = None) -> None:
        """Note with which state a slot begins a step, unless it draws numbers before.

        Args:
            step: The number of steps that are completed; -1 in a replacement that has no state yet.
            state: From :func:`~lightning_scar.continuation.snapshot.random_state`.
            slot: The slot; by default this worker's.

        """
        slot = self._slot if slot is None else slot
        if self._is_noted(slot, step, state):
            return
        if slot not in self._files:
            self._files[slot] = _opened(slot)
        file = self._files[slot]
        cpu, device = state
        head = _HEAD.pack(step, cpu.numel(), 0 if device is None else device.numel())
        parts = [head, cpu.numpy(), *(() if device is None else (device.numpy(),))]
        if file is None or step < 0 or sum(map(len, parts)) + _CHECKSUM.size > _RECORD:
            return
        at, checksum = step % 2 * _RECORD, 0
        for part in parts:
            file[at : at + len(part)] = part
            at, checksum = at + len(part), zlib.crc32(part, checksum)
        file[at : at + _CHECKSUM.size] = _CHECKSUM.pack(checksum)
        self._last = slot, step, state

    def _is_noted(self, slot: int, step: int, state: list[Any]) -> bool:
        """Return whether the last note says the same: mostly, nothing is drawn between two steps."""
        last_slot, last_step, last = self._last
        return (slot, step) == (last_slot, last_step) and all(map(_are_equal, state, last))

    def of(self, slot: int, step: int) -> list[Any] | None:
        """Return the state with which a slot begins a step; ``None`` if that is not known on this host.

        Args:
            slot: The slot.
            step: The number of steps that are completed.

        """
        return dict(_records(slot)).get(step)

    def plain(self, step: int) -> dict[str, Any]:
        """Return :meth:`of` this worker, as ``set_random_generators`` takes it; nothing if that is not known.

        Args:
            step: The number of steps that are completed.

        """
        return dict(zip(("torch", "device"), self.of(self._slot, step) or (), strict=False))

    def take_over(self, step: int) -> None:
        """Let this process, a replacement, draw what the worker before it would have drawn.

        Where nobody has computed the batches that were due meanwhile, it goes on with those.

        Args:
            step: The number of steps that are completed.

        """
        known = {at: state for at, state in _records(self._slot) if at <= step}
        if known:
            set_random_state(known[max(known)])


def _are_equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _path(slot: int) -> Path | None:
    return in_memory(f"generators-{slot}")


def _opened(slot: int) -> mmap.mmap | None:
    path = _path(slot)
    try:
        if path is None:
            return None
        with path.open("ab") as file:
            # Memory that is taken now cannot be missing when it is written to, which would end this process.
            file.write(bytes(max(2 * _RECORD - file.tell(), 0)))
        with path.open("r+b") as file:
            return mmap.mmap(file.fileno(), 2 * _RECORD)
    except OSError:
        return None


def _records(slot: int) -> Iterator[tuple[int, list[Any]]]:
    """Yield each step of which a slot's state is known, and the state."""
    path = _path(slot)
    content = path.read_bytes() if path is not None and path.exists() else b""
    for at in (0, _RECORD) if len(content) >= 2 * _RECORD else ():
        step, on_cpu, on_device = _HEAD.unpack_from(content, at)
        first, end = at + _HEAD.size, at + _HEAD.size + on_cpu + on_device
        # A record that was being written has another one.
        if _CHECKSUM.pack(zlib.crc32(content[at:end])) == content[end : end + _CHECKSUM.size]:
            states = torch.frombuffer(bytearray(content[first:end]), dtype=torch.uint8)
            yield step, [states[:on_cpu].clone(), states[on_cpu:].clone() if on_device else None]
