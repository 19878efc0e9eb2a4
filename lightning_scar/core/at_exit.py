"""Copies to storage what only memory holds when a program exits without closing its running checkpoint."""

import atexit
import os
import warnings
from collections.abc import Callable
from functools import partial

from lightning_scar.core.membership import RunMembership
from lightning_scar.storage.rank_store import RankStore


def write_back_at_exit(store: RankStore, membership: RunMembership) -> Callable[[], None]:
    """Register the copy for the exit of the interpreter, normal or by an exception. Runs no collective.

    Memory is kept for the next start, and with it the lease that refers to it. Nothing happens in a process that is
    killed, or that exits like the children of ``multiprocessing``.

    Args:
        store: The store to copy.
        membership: The right to write to its directory.

    Returns:
        A function that cancels it.

    """
    leave = atexit.register(partial(_leave, store, membership, os.getpid()))
    return partial(atexit.unregister, leave)


def _leave(store: RankStore, membership: RunMembership, process: int) -> None:
    # Forked child processes run exit handlers, too.
    if os.getpid() != process or membership.is_lost:
        return
    is_stored = True
    try:
        store.bring_to_storage()
    except Exception as error:
        is_stored = False
        warnings.warn(f"lightning-scar: the last saves are in this host's memory only: {error!r}", stacklevel=1)
    membership.release(is_stored)
