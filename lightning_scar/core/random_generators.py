"""The states of a process's random generators, as plain values and tensors."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_generators() -> dict[str, Any]:
    """Return the states of Python's generator, NumPy's legacy one, torch's on the CPU and, if initialized, on CUDA.

    Example::

        >>> states = random_generators()
        >>> first = torch.rand(1)
        >>> set_random_generators(states)
        >>> bool(torch.rand(1) == first)
        True

    """
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    name, keys, *rest = numpy_state
    uses_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    # Tensors instead of hundreds of numbers, because a save visits each value of the checkpoint.
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if uses_cuda else [],
    }


def set_random_generators(states: Mapping[str, Any]) -> None:
    """Set the states that :func:`random_generators` returned."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
