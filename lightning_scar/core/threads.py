"""Threads that work on tensors beside the training, and pieces of work for them."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def pool(size: int, name: str) -> ThreadPoolExecutor:
    """So many threads whose torch operations use one core each, and so do not fight for all of them.

    Args:
        size: The number of threads.
        name: What their names begin with.

    Example::

        >>> with pool(1, "example") as threads:
        ...     threads.submit(torch.get_num_threads).result()
        1

    """
    threads = torch.get_num_threads()
    found = ThreadPoolExecutor(size, name, initializer=_use_one_core)
    for started in [found.submit(int) for _ in range(size)]:
        started.result()
    # The number holds for the thread that set it, but is also what later threads begin with.
    torch.set_num_threads(threads)
    return found


def _use_one_core() -> None:
    torch.set_num_threads(1)
    # A thread that asks for the first time takes over what holds for later threads at that time.
    torch.get_num_threads()


def batches(pieces: Iterable[T], nbytes: Callable[[T], int], at_least: int) -> Iterator[list[T]]:
    """Puts small pieces together, so that handing them to a thread is worth it.

    Args:
        pieces: The pieces.
        nbytes: How large one is.
        at_least: How large a batch is to be.

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
