"""Which deltas to merge so that a store stays within its bounds. Pure functions."""

from collections.abc import Sequence
from typing import NamedTuple

#: A rank keeps at most this many files.
MAX_FILES = 64
#: Merging begins here, so that the bound holds while a merge and the saves beside it are under way.
_MERGE_FROM_FILES = 48
#: One merge of more than a few files takes at most this share of the state. As much is kept free.
_SHARE = 1 / 8
#: A file with a smaller share of dead bytes is not rewritten to gain bytes.
_LEAST_DEAD = 0.1


#: The bound on stored bytes, in sizes of the state: two versions of every block, and what is to be merged.
STATES = 3


class Usage(NamedTuple):
    """How much of a delta is still needed.

    Attributes:
        nbytes: Its size.
        live: Bytes of blocks that are kept.
        newest: The share of these blocks that are the newest version, not one to fall back to.
        age: Saves since it was written.
        may_merge: Whether it may be replaced.

    """

    nbytes: int
    live: int
    newest: float = 1.0
    age: int = 0
    may_merge: bool = True

    @property
    def cost(self) -> float:
        """Bytes to copy for each byte gained, weighted; higher for a file that will soon be empty anyway.

        An older version lives until its block's next save, a newest one twice as long; the older either is, the sooner
        it dies. The constants come from simulations of saves in turn and of saves of the furthest blocks.
        """
        return self.live / (self.nbytes - self.live) * float((1 + self.age) ** 0.25) / (0.2 + self.newest)


def worth_merging(usage: Sequence[Usage], state_bytes: int, save_bytes: int) -> list[int]:
    """Return which deltas to replace by one or two that hold only their live blocks.

    Args:
        usage: Every delta of the rank that has live blocks.
        state_bytes: Bytes of the rank's share of the training state.
        save_bytes: Bytes of one partial save, kept free for the next.

    Returns:
        Indices into ``usage``; empty when the store is within its bounds.

    Example:
        Three files as large as the state; the first has the fewest live bytes::

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
        # The live bytes alone exceed the bound (headers of tiny blocks); merging at every save would not help.
        return live / 0.75
    # A full save is as large as the state; keeping that free would leave no room for dead bytes.
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
