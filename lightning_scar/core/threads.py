"""Threads that work on tensors alongside the training, and batches of work for them."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def pool(size: int, name: str) -> ThreadPoolExecutor:
    """Start threads whose torch operations use one core each.

    Args:
        size: The number of threads.
        name: The prefix of their names.

    Example::

        >>> with pool(1, "example") as threads:
        ...     threads.submit(torch.get_num_threads).result()
        1

    """
    threads = torch.get_num_threads()
    found = ThreadPoolExecutor(size, name, initializer=_use_one_core)
    for started in [found.submit(int) for _ in range(size)]:
        started.result()
    # `set_num_threads` also sets the default of later threads: restore it.
    torch.set_num_threads(threads)
    return found


def _use_one_core() -> None:
    torch.set_num_threads(1)
    # The first call in a thread adopts the default of that time: call it now.
    torch.get_num_threads()


def batches(pieces: Iterable[T], nbytes: Callable[[T], int], at_least: int) -> Iterator[list[T]]:
    """Combine small pieces to batches that are worth handling as one.

    Args:
        pieces: The pieces.
        nbytes: Returns the size of a piece.
        at_least: The least size of a batch, except the last.

    Example::

        >>> list(batches(["a", "bcd", "ef", "g", "h"], len, at_least=3))
        [['a', 'bcd'], ['ef', 'g'], ['h']]

    """
    batch: list[T] = []
    total = 0
    for piece in pieces:
        batch.append(piece)
        total += nbytes(piece)
        if total >= at_least:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
