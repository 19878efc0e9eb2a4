"""A chain of samplers: the random generators in it, the rank whose samples it serves, and its copies."""

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from lightning_scar.core.random_generators import Generator

#: The names of a rank and of the number of ranks: torch's and Lightning's, Accelerate's, and others that are common.
_RANKS = (
    ("rank", "num_replicas"),
    ("process_index", "num_processes"),
    ("rank", "world_size"),
    ("_rank", "_world_size"),
)
#: Where samplers hold others, which may be of any class.
_INNER = ("sampler", "batch_sampler", "_sampler")
_ATOMS = {bool, int, float, str, bytes, type(None)}


def generators(sampler: Any) -> list[Any]:
    """Return the random generators of a sampler and of the samplers inside it."""
    values = (value for each in chain(sampler) for value in vars(each).values())
    return list({id(value): value for value in values if isinstance(value, Generator)}.values())


def is_divided(sampler: Any) -> bool:
    """Return whether a sampler, or one inside it, knows of several ranks."""
    return any(vars(each).get(size, 1) != 1 for each in chain(sampler) for _, size in _RANKS)


def knows_rank(sampler: Any, rank: int, size: int) -> bool:
    """Return whether a sampler, or one inside it, serves the samples of this rank among a number of ranks."""
    return any(_rank_names(each, rank, size) for each in chain(sampler))


def copied(sampler: Any, dataset: Any, own: int = 0, size: int = 0, rank: int = 0) -> Any:
    """Return a copy of a sampler and of those inside it, perhaps for another rank.

    Drawing from the copy changes nothing of the original: generators and containers are copied as well.

    Args:
        sampler: The sampler.
        dataset: What is not copied.
        own: The rank of this process.
        size: The number of ranks.
        rank: The rank that takes the place of ``own`` where the copy knows ``own`` and ``size``.

    Example::

        >>> from torch.utils.data import DistributedSampler
        >>> own = DistributedSampler(range(6), num_replicas=2, rank=0, shuffle=False)
        >>> list(own), list(copied(own, own.dataset, 0, 2, rank=1))
        ([0, 2, 4], [1, 3, 5])

    """
    #: By their id: values, so that they stay alive, and their copies.
    done: dict[int, tuple[Any, Any]] = {id(dataset): (dataset, dataset)}

    def of(value: Any, is_sampler: bool = False) -> Any:
        if id(value) not in done:
            of_sampler(value) if is_sampler or _is_sampler(value) else done.update({id(value): (value, _of(value, of))})
        return done[id(value)][1]

    def of_sampler(value: Any) -> None:
        new = copy.copy(value)
        done[id(value)] = value, new
        names = _rank_names(value, own, size)
        for name, item in getattr(value, "__dict__", {}).items():
            vars(new)[name] = rank if name in names else of(item, name in _INNER)

    return of(sampler, is_sampler=True)


def _of(value: Any, of: Any) -> Any:
    """Return a copy of a value that a sampler may change, or the value."""
    if isinstance(value, torch.Generator):
        generator = torch.Generator(device=value.device)
        generator.set_state(value.get_state())
        return generator
    if isinstance(value, Generator | np.ndarray):
        return copy.deepcopy(value)
    if isinstance(value, Tensor):
        return value.clone()
    kind = type(value)
    if kind in (set, deque) or (kind in (list, tuple) and set(map(type, value)) <= _ATOMS):
        return copy.copy(value)
    if kind in (list, tuple):
        return kind(map(of, value))
    return {key: of(item) for key, item in value.items()} if kind is dict else value


def _rank_names(sampler: Any, rank: int, size: int) -> list[str]:
    """Return under which names a sampler holds its rank, if it is this one."""
    own = getattr(sampler, "__dict__", {})
    return [name for name, number in _RANKS if own.get(name) == rank and own.get(number) == size]


def _is_sampler(value: Any) -> bool:
    return isinstance(value, Sampler) or (hasattr(value, "_sampler") and hasattr(value, "__dict__"))


def chain(sampler: Any, found: set[int] | None = None) -> Iterator[Any]:
    """Yield a sampler and those inside it."""
    found = set() if found is None else found
    if id(sampler) in found or not hasattr(sampler, "__dict__"):
        return
    found.add(id(sampler))
    yield sampler
    for name, value in vars(sampler).items():
        if name in _INNER or _is_sampler(value):
            yield from chain(value, found)
