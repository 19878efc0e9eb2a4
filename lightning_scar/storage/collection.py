"""Python's garbage collector, out of the way."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Keeps the cyclic collector from running while tens of thousands of small objects are made.

    They hold no cycles, and every few thousand of them would have it walk over all of torch: most of the time that it
    takes to read the headers of a directory.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
