"""A tensor's bytes, without a copy, and what is asked of them."""

import torch
from torch import Tensor

#: Elements that are converted at once where that is needed.
_CHUNK = 1 << 16


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


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or Inf, without a temporary of the tensor's size.

    Example::

        >>> is_finite(torch.tensor([1.0, float("inf")])), is_finite(torch.tensor([1, 2]))
        (False, True)

    """
    if not (values.is_floating_point() or values.is_complex()):
        return True
    if values.is_complex():
        values = torch.view_as_real(values)
    if values.dtype.itemsize == 1:
        return all(bool(chunk.float().isfinite().all()) for chunk in torch.split(values.reshape(-1), _CHUNK))
    return bool(torch.linalg.vector_norm(values, ord=torch.inf).isfinite())
