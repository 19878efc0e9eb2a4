"""A tensor's bytes without a copy, and checks of its values."""

import torch
from torch import Tensor

#: Elements converted at once, for 1-byte floats.
_CHUNK = 1 << 16


def memory(tensor: Tensor) -> memoryview:
    r"""Return the memory of a contiguous CPU tensor: writable, 1-d, in bytes.

    Example::

        >>> memory(torch.tensor([1, 2], dtype=torch.int16)).tobytes()
        b'\x01\x00\x02\x00'

    """
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def readable(nbytes: float) -> str:
    """Format a number of bytes.

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
    """Return whether no element is NaN or Inf, without a temporary of the tensor's size.

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
