"""Whether ranks divide one order of the data: each notes what it drew the order from, where others of its host find it.

Orders that depend on a seed and an epoch are the same on all ranks. Those of random generators are, as long as the
generators are.
"""

from collections import deque
from contextlib import suppress
from typing import Any

from lightning_scar.core.data_order import Beginning, OwnGenerators
from lightning_scar.core.rank_batches import RankBatches
from lightning_scar.elastic.worker import state_folder


class RankOrders:
    """What the orders of the ranks depend on, in the epochs that they began last.

    Args:
        rank: This worker's rank in the complete group.
        number: That of a loader.

    Example::

        >>> orders = RankOrders(rank=1)
        >>> orders.note(Beginning(sampler=None))
        >>> orders.agrees(0) is None
        True

    """

    def __init__(self, rank: int, number: int = 0) -> None:
        self._rank, self._number = rank, number
        #: The digests of the last epochs: a rank may have died before its first batch of the present one.
        self._own: deque[str] = deque(maxlen=2)

    def note(self, beginning: Beginning) -> None:
        """Note how this rank's present epoch began."""
        digest = beginning.digest()
        self._own.append(digest)
        # Without a supervisor nobody asks; without room nothing is known.
        with suppress(KeyError, OSError):
            state_folder.write(self._name(self._rank), lambda file: file.write(digest.encode()))

    def agrees(self, rank: int) -> bool | None:
        """Return whether the generators of another rank were those of this one; ``None`` if that is not known."""
        path = next(iter(state_folder.find_all(self._name(rank))), None)
        with suppress(OSError):
            return path.read_text() in self._own if path is not None else None
        return None

    def _name(self, rank: int) -> str:
        return f"order-{rank}-{self._number}"


def rank_batches(loader: Any, order: OwnGenerators | None, rank: int, size: int, number: int = 0) -> RankBatches:
    """Return what loads the batches of other ranks, and let this rank note how its epochs begin.

    Args:
        loader: The loader of this rank.
        order: What follows it; ``None`` if nothing does.
        rank: This rank in the complete group.
        size: The number of ranks in it.
        number: The loader's, if there are several.

    """
    orders = RankOrders(rank, number)
    if order is not None:
        order.on_begin = orders.note
    return RankBatches(loader, order, rank, size, orders.agrees)
