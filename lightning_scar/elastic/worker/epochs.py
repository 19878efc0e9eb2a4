"""Which worker has no more batches where another one goes on: nobody would answer the collectives of that one."""

import time
from collections.abc import Callable

from torch.distributed import Store  # type: ignore[attr-defined]

_POLL_SECONDS = 0.02


class Epochs:
    """What a worker tells of the ends of its epochs, and what it learns of those of the others.

    Args:
        slot: This worker's slot.
        generation: Returns the number of its present generation.

    Example::

        >>> from torch.distributed import HashStore
        >>> store = HashStore()
        >>> first, second = Epochs(0, lambda: 0), Epochs(1, lambda: 0)
        >>> second.goes_on_after = (6, 0)
        >>> second.left_behind_by(store)
        >>> first.end(store, step=6, times=1)
        >>> second.left_behind_by(store)
        (0, 6)

    """

    def __init__(self, slot: int, generation: Callable[[], int]) -> None:
        self._slot = slot
        self._generation = generation
        #: The number of trainings that this process has begun.
        self.trainings = 0
        #: The number of completed steps after which this worker has begun another batch, and how many times it had no
        #: more batches before; ``None`` if it is elsewhere.
        self.goes_on_after: tuple[int, int] | None = None
        #: What :meth:`left_behind_by` has found. It stays true, whatever this worker does until it learns of it.
        self._found: tuple[int, int] | None = None

    def end(self, store: Store, step: int, times: int) -> None:
        """Tell the others that this worker has no more batches for now, before any collective that follows.

        Args:
            store: The supervisor's.
            step: The number of completed steps.
            times: How many times this worker had no more batches in this training.

        """
        store.set(self._key(times), f"{step} {self._slot}")
        # The store does not confirm a set.
        store.check([self._key(times)])

    def left_behind_by(self, store: Store) -> tuple[int, int] | None:
        """Return the slot of a worker that has no more batches where this one has, and its step; else ``None``.

        Args:
            store: The supervisor's.

        """
        goes_on_after = self.goes_on_after
        if self._found is not None or goes_on_after is None:
            return self._found
        done, times = goes_on_after
        key = self._key(times + 1)
        if store.check([key]):
            step, slot = map(int, store.get(key).decode().split())
            self._found = (slot, step) if done >= step else None
        return self._found

    def wait_until_over(self, store: Store, members: int, limit: float, stops: Callable[[], bool]) -> None:
        """Tell the others that this worker's training is over, and wait until theirs are.

        Args:
            store: The supervisor's.
            members: The number of workers, with this one.
            limit: For how many seconds at most.
            stops: Whether to stop waiting.

        """
        key = f"epochs/{self._generation()}/{self.trainings}/over"
        over, until = store.add(key, 1), time.monotonic() + limit
        while over < members and time.monotonic() < until and not stops():
            time.sleep(_POLL_SECONDS)
            over = store.add(key, 0)

    def _key(self, times: int) -> str:
        return f"epochs/{self._generation()}/{self.trainings}/{times}"
