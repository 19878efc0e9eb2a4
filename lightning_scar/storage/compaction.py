"""Which deltas to merge so that a store stays within its bounds. Pure functions."""

from collections.abc import Sequence
from typing import NamedTuple

#: A rank keeps at most this many files.
MAX_FILES = 64
#: Merging begins here, so that the bound holds while a merge and the saves beside it are under way.
_MERGE_FROM_FILES = 48
#: What is merged at once is at most this share of the state, if it is more than a few files. So much is kept free, too.
_SHARE = 1 / 8
#: A file with less to give is not rewritten for the sake of bytes.
_LEAST_DEAD = 0.1


#: The bound on bytes at rest, in states: two versions of every block, and what is to be merged.
STATES = 3


class Usage(NamedTuple):
    """How much of a delta is still needed.

    Attributes:
        nbytes: Bytes in all.
        live: Bytes of blocks that are kept.
        newest: The share of these blocks that are the newest version, not one to fall back to.
        age: Saves since it was written.
        may_merge: Whether it may be replaced at all.

    """

    nbytes: int
    live: int
    newest: float = 1.0
    age: int = 0
    may_merge: bool = True

    @property
    def cost(self) -> float:
        """Bytes to copy for each byte gained; more for a file that empties soon by itself.

        An older version lives until its block is saved next, a newest one for twice as long, and either dies the
        sooner the older it is. The numbers are from simulations of saves in turn and of saves of the furthest blocks.
        """
        return self.live / (self.nbytes - self.live) * float((1 + self.age) ** 0.25) / (0.2 + self.newest)


def worth_merging(usage: Sequence[Usage], state_bytes: int, save_bytes: int) -> list[int]:
    """Which deltas to replace by one or two that hold only what they still have to offer.

    Args:
        usage: Every delta of the rank, none of them wholly dead.
        state_bytes: Bytes of the rank's share of the training state.
        save_bytes: Bytes of one partial save, kept free for the next.

    Returns:
        Indices into ``usage``; empty when the store is within its bounds.

    Example:
        Three states' worth of bytes, of which the first file needs the fewest::

            >>> worth_merging([Usage(100, 20), Usage(100, 90), Usage(100, 95)], state_bytes=100, save_bytes=10)
            [0]

    """
    may_merge = [i for i, each in enumerate(usage) if each.may_merge]
    if len(usage) > _MERGE_FROM_FILES:
        # At least three, since they may become two.
        return _filled(sorted(may_merge, key=lambda i: usage[i].live), usage, state_bytes, at_least=3)
    if sum(each.nbytes for each in usage) > _limit(usage, state_bytes, save_bytes):
        found = [i for i in may_merge if usage[i].live < usage[i].nbytes * (1 - _LEAST_DEAD)]
        return _filled(sorted(found, key=lambda i: usage[i].cost), usage, state_bytes, at_least=1)
    return []


def _limit(usage: Sequence[Usage], state_bytes: int, save_bytes: int) -> float:
    live = sum(each.live for each in usage)
    if live > STATES * state_bytes:
        # What is kept breaks the bound by itself (headers of tiny blocks), and merging at every save would not help.
        return live / 0.75
    # A full save is as large as the state: to keep that free would leave no room for anything dead.
    return STATES * state_bytes - min(save_bytes, state_bytes * _SHARE)


def _filled(order: list[int], usage: Sequence[Usage], state_bytes: int, at_least: int) -> list[int]:
    chosen: list[int] = []
    total = 0
    for i in order:
        total += usage[i].live
        if len(chosen) >= at_least and total > state_bytes * _SHARE:
            break
        chosen.append(i)
    return chosen
