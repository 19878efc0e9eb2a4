"""Sends nested tensors from one member of a process group to others."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_scar.core.skeleton import pack, put_together, take_apart, unpack
from lightning_scar.core.threads import batches

#: Bytes of one message.
_MESSAGE = 1 << 26


def send(value: Any, receivers: Sequence[int]) -> None:
    """Send nested dicts, lists and tuples of tensors and plain values; the receivers call :func:`receive`.

    Args:
        value: Anything that can be pickled; tensors may be on any device and arrive on the CPU.
        receivers: Their ranks in the default process group.

    Raises:
        RuntimeError: If the connection is lost.

    """
    skeleton, leaves = take_apart(value, {})
    header = {
        "skeleton": bytes(pack({"skeleton": skeleton})),
        "leaves": [(leaf.path, tuple(leaf.tensor.shape), leaf.tensor.dtype) for leaf in leaves],
    }
    flat = [leaf.tensor.contiguous().view(-1).view(torch.uint8) for leaf in leaves]
    for receiver in receivers:
        dist.send_object_list([header], dst=receiver)
        for batch in batches(flat, lambda part: part.nbytes, _MESSAGE):
            dist.send(torch.cat([part.to(_device()) for part in batch]), dst=receiver)


def receive(source: int) -> Any:
    """Receive what the source sent with :func:`send`.

    Args:
        source: Its rank in the default process group.

    Returns:
        The value, its tensors on the CPU.

    Raises:
        RuntimeError: If the connection is lost.

    """
    message: list[Any] = [None]
    dist.recv_object_list(message, src=source)
    header = message[0]
    tensors = {path: torch.empty(shape, dtype=dtype, device="cpu") for path, shape, dtype in header["leaves"]}
    flat = [tensor.view(-1).view(torch.uint8) for tensor in tensors.values()]
    for batch in batches(flat, lambda part: part.nbytes, _MESSAGE):
        received = torch.empty(sum(part.nbytes for part in batch), dtype=torch.uint8, device=_device())
        dist.recv(received, src=source)
        _scatter(received.cpu(), batch)
    # Unpickling is safe: the sender is a process of the same program.
    skeleton = unpack(memoryview(header["skeleton"]), weights_only=False)["skeleton"]
    return put_together(skeleton, tensors)


def _device() -> torch.device:
    is_nccl = dist.get_backend() == dist.Backend.NCCL
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def _scatter(received: Tensor, parts: Sequence[Tensor]) -> None:
    for part, piece in zip(parts, torch.split(received, [part.nbytes for part in parts]), strict=True):
        part.copy_(piece)
