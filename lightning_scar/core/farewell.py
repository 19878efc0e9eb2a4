"""A program that ends without closing its running checkpoint: what memory alone has is brought to storage."""

import atexit
import os
import warnings
from collections.abc import Callable
from functools import partial

from lightning_scar.core.claim import Claim
from lightning_scar.storage.rank_store import RankStore


def at_exit(store: RankStore, claim: Claim) -> Callable[[], None]:
    """Sees to it when the interpreter ends, by itself or by an exception, without a collective.

    Memory stays as it is for the next start, and where there is any so does the lease, which tells of it. A process
    that is killed, or that ends like the children of ``multiprocessing``, leaves things as they are.

    Args:
        store: What is written to.
        claim: The right to do so.

    Returns:
        What calls it off.

    """
    leave = atexit.register(partial(_leave, store, claim, os.getpid()))
    return partial(atexit.unregister, leave)


def _leave(store: RankStore, claim: Claim, process: int) -> None:
    # A child process that was forked ends, too, and has nothing to do with it.
    if os.getpid() != process or claim.is_lost:
        return
    is_stored = True
    try:
        store.bring_to_storage()
    except Exception as error:
        is_stored = False
        warnings.warn(f"lightning-scar: the last saves are in this host's memory only: {error!r}", stacklevel=1)
    claim.release(is_stored)
