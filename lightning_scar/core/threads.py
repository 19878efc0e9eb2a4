"""Independent pieces of work, shared out among threads."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

#: Calls a function with each piece, in any order, and returns when all are done.
Run = Callable[[Callable[[Any], None], Iterable[Any]], None]

T = TypeVar("T")


def in_turn(function: Callable[[Any], None], pieces: Iterable[Any]) -> None:
    """A :data:`Run` in the thread that calls it.

    Example::

        >>> found = []
        >>> in_turn(found.append, [1, 2])
        >>> found
        [1, 2]

    """
    for piece in pieces:
        function(piece)


@contextmanager
def team(size: int) -> Iterator[Run]:
    """A :data:`Run` in so many threads.

    They do what torch's own would, but are not woken for every piece anew, which takes longer than a small copy. The
    function should spend its time where Python lets other threads run.

    Args:
        size: The number of threads; 1 needs no other thread.

    """
    if size == 1:
        yield in_turn
        return
    with ThreadPoolExecutor(size, "scar-team") as pool:

        def run(function: Callable[[Any], None], pieces: Iterable[Any]) -> None:
            for _ in pool.map(function, pieces):
                pass

        yield run


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
