"""A tensor's bytes, without a copy, and bytes in words."""

import torch
from torch import Tensor


def memory(tensor: Tensor) -> memoryview:
    r"""The memory of a contiguous tensor on the CPU, writable, one dimension of bytes.

    Example::

        >>> memory(torch.tensor([1, 2], dtype=torch.int16)).tobytes()
        b'\x01\x00\x02\x00'

    """
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def readable(nbytes: float) -> str:
    """A number of bytes for people.

    Example::

        >>> readable(1_490_000_000)
        '1.49 GB'

    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
