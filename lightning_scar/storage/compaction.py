"""Which deltas to merge so that a store stays within its bounds. Pure functions."""

from collections.abc import Sequence
from typing import NamedTuple

#: A rank keeps at most this many files.
MAX_FILES = 64
#: Merging begins here, so that the bound holds while a merge and the saves beside it are under way.
_MERGE_FROM_FILES = 48
#: A merged delta is at most this share of the state, if it is made of more than one file.
_MERGED_SHARE = 1 / 8


class Retention(NamedTuple):
    """How much of the past a store keeps.

    Attributes:
        older: Whether to keep an older version of every block beside the newest, to fall back to.
        states: The bound on bytes at rest, in states.

    """

    older: bool
    states: int


#: Two versions of every block make two states.
WITH_OLDER = Retention(older=True, states=3)
#: During a full save the state is there twice.
NEWEST_ONLY = Retention(older=False, states=2)


class Usage(NamedTuple):
    """How much of a delta is still needed: bytes in all, and those of blocks that are kept."""

    nbytes: int
    live: int


def worth_merging(
    usage: Sequence[Usage], state_bytes: int, save_bytes: int, states: int = WITH_OLDER.states
) -> list[int]:
    """Which deltas to replace by one that holds only what they still have to offer.

    Args:
        usage: Every delta of the rank, none of them wholly dead.
        state_bytes: Bytes of the rank's share of the training state.
        save_bytes: Bytes of one partial save, kept free for the next.
        states: The bound on the bytes of all, in states.

    Returns:
        Indices into ``usage``; empty when the store is within its bounds.

    Example:
        Three states' worth of bytes, of which the first file needs the fewest::

            >>> worth_merging([Usage(100, 20), Usage(100, 90), Usage(100, 95)], state_bytes=100, save_bytes=10)
            [0]

    """
    if len(usage) > _MERGE_FROM_FILES:
        smallest = sorted(range(len(usage)), key=lambda i: usage[i].live)
        return _filled(smallest, usage, state_bytes, at_least=2)
    if sum(nbytes for nbytes, _ in usage) > _limit(usage, state_bytes, save_bytes, states):
        emptiest = sorted(
            (i for i in range(len(usage)) if usage[i].live < usage[i].nbytes * 0.9),
            key=lambda i: usage[i].live / usage[i].nbytes,
        )
        return _filled(emptiest, usage, state_bytes, at_least=1)
    return []


def _limit(usage: Sequence[Usage], state_bytes: int, save_bytes: int, states: int) -> float:
    live = sum(each.live for each in usage)
    if live > states * state_bytes:
        # What is kept breaks the bound by itself (headers of tiny blocks), and merging at every save would not help.
        return live / 0.75
    return states * state_bytes - save_bytes


def _filled(order: list[int], usage: Sequence[Usage], state_bytes: int, at_least: int) -> list[int]:
    chosen: list[int] = []
    total = 0
    for i in order:
        total += usage[i].live
        if len(chosen) >= at_least and total > state_bytes * _MERGED_SHARE:
            break
        chosen.append(i)
    return chosen
