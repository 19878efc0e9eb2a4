"""The states of random generators, as plain values and tensors."""

import hashlib
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_generators() -> dict[str, Any]:
    """Return the states of this process's generators: Python's, NumPy's legacy one, torch's on the CPU and on CUDA.

    That of CUDA is empty as long as nothing has used CUDA.

    Example::

        >>> states = random_generators()
        >>> first = torch.rand(1)
        >>> set_random_generators(states)
        >>> bool(torch.rand(1) == first)
        True

    """
    return kept_generators()()


def kept_generators() -> Callable[[], dict[str, Any]]:
    """Keep the present states, without the cost of making them plain; the result returns them as such."""
    uses_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if uses_cuda else []
    return partial(_plain_states, random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state(), cuda)


def _plain_states(python: Any, numpy: Any, torch_cpu: Tensor, cuda: list[Tensor]) -> dict[str, Any]:
    return {"python": _of_python(python), "numpy": _of_numpy(numpy), "torch": torch_cpu, "cuda": cuda}


def cpu_generators() -> dict[str, Any]:
    """Return :func:`random_generators` without CUDA's."""
    return {
        "python": _of_python(random.getstate()),
        "numpy": _of_numpy(np.random.get_state(legacy=True)),
        "torch": torch.get_rng_state(),
    }


def set_random_generators(states: Mapping[str, Any]) -> None:
    """Set the states that :func:`random_generators` or :func:`cpu_generators` returned, or some of them."""
    if "python" in states:
        random.setstate(_to_python(states["python"]))
    if "numpy" in states:
        np.random.set_state(_to_numpy(states["numpy"]))
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    cuda = states.get("cuda")
    if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    if states.get("device") is not None:
        torch.cuda.set_rng_state(states["device"])


# -- a generator of one's own ------------------------------------------------------------------------------------------

#: The kinds of generators whose states can be saved.
Generator = torch.Generator | random.Random | np.random.RandomState | np.random.Generator


def generator_state(generator: Generator) -> Any:
    """Return the state of a generator.

    Example::

        >>> generator = random.Random(0)
        >>> state = generator_state(generator)
        >>> first = generator.random()
        >>> set_generator_state(generator, state)
        >>> generator.random() == first
        True

    """
    match generator:
        case torch.Generator():
            return generator.get_state()
        case random.Random():
            return _of_python(generator.getstate())
        case np.random.RandomState():
            return _of_numpy(generator.get_state(legacy=True))
    state = generator.bit_generator.state
    return {key: _plain(value) for key, value in state.items()}


def set_generator_state(generator: Generator, state: Any) -> None:
    """Set what :func:`generator_state` returned."""
    match generator:
        case torch.Generator():
            generator.set_state(state)
        case random.Random():
            generator.setstate(_to_python(state))
        case np.random.RandomState():
            generator.set_state(_to_numpy(state))
        case _:
            generator.bit_generator.state = state


def same_state(a: Any, b: Any) -> bool:
    """Return whether two states are equal."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_state, a, b))
    return bool(a == b)


def state_digest(state: Any) -> str:
    """Return a short text that is the same for equal states, in all processes."""
    parts: list[bytes] = []

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            parts.append(value.numpy().tobytes())
        elif isinstance(value, dict | list):
            for item in value.items() if isinstance(value, dict) else value:
                add(list(item) if isinstance(item, tuple) else item)
        else:
            parts.append(repr(value).encode())

    add(state)
    return hashlib.sha1(b"|".join(parts), usedforsecurity=False).hexdigest()


# Tensors instead of hundreds of numbers, because a save visits each value of the checkpoint.


def _of_python(state: tuple[Any, ...]) -> list[Any]:
    version, words, gauss = state
    return [version, torch.tensor(words, device="cpu"), gauss]


def _to_python(state: list[Any]) -> tuple[Any, ...]:
    version, words, gauss = state
    return version, tuple(words.tolist()), gauss


def _of_numpy(state: Any) -> list[Any]:
    name, keys, *rest = state
    return [name, torch.from_numpy(keys.astype(np.int64)), *rest]


def _to_numpy(state: list[Any]) -> tuple[Any, ...]:
    name, keys, *rest = state
    return (name, keys.numpy().astype(np.uint32), *rest)


def _plain(value: Any) -> Any:
    """Return a part of a bit generator's state without arrays."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value
