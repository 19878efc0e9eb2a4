"""The batches of other ranks: a survivor loads those of the ranks that are missing."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from lightning_scar.core.data_order import Beginning, EpochOrder, is_indexed
from lightning_scar.core.private import forget_iterator
from lightning_scar.core.random_generators import kept_generators, set_random_generators
from lightning_scar.core.samplers import chain, copied, knows_rank


class RankBatches:
    """The batches of the present epoch, as the loaders of other ranks give them.

    The order of a rank is a function of its sampler and of the generators when the epoch began. So a copy of this
    rank's sampler, which serves the other rank, gives its indices, and a copy of this rank's loader loads them.
    Neither random numbers nor the order of this process change.

    Args:
        loader: The loader of this rank.
        order: Its :class:`~lightning_scar.core.data_order.EpochOrder`; ``None`` if it has none.
        rank: This rank in the complete group, which the samplers divide the data among.
        size: The number of ranks in it.
        agrees: Tells whether a rank's generators were as this one's when the epoch began; ``None`` if that is unknown.

    Attributes:
        loader: The loader of this rank.

    Example::

        >>> from torch.utils.data import DistributedSampler
        >>> sampler = DistributedSampler(range(8), num_replicas=2, rank=0, shuffle=False)
        >>> loader = DataLoader(range(8), batch_size=2, sampler=sampler)
        >>> others = RankBatches(loader, EpochOrder(loader), rank=0, size=2)
        >>> next(iter(loader)), others.batches(1, [0, 1])
        (tensor([0, 2]), [tensor([1, 3]), tensor([5, 7])])

    """

    def __init__(
        self, loader: Any, order: Any, rank: int, size: int, agrees: Callable[[int], bool | None] = lambda rank: None
    ) -> None:
        self.loader = loader
        self._order = order
        self._rank, self._size, self._agrees = rank, size, agrees
        self._beginning: Beginning | None = None
        #: Why the batches of this epoch are unknown; empty if they are known, ``None`` before that is found out.
        self._verdict: str | None = None
        #: By rank: an order that was drawn already, and the number of its first batch.
        self._drawn: dict[int, tuple[EpochOrder, int]] = {}
        #: By rank: the number of the next batch, an iterator, and its loader.
        self._iterators: dict[int, tuple[int, Iterator[Any], Any]] = {}
        #: By rank: the batches of the last call, by number.
        self._kept: dict[int, dict[int, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which has loaded nothing: spawned processes of loaders may get one."""
        return {**vars(self), "_drawn": {}, "_iterators": {}, "_kept": {}}

    def batches(self, rank: int, positions: Sequence[int]) -> list[Any]:
        """Return batches of a rank; those of the last call are kept, so that a step can be repeated.

        They are copies, because a training step may change its batch.

        Args:
            rank: The rank.
            positions: The numbers of its batches in the present epoch, or in the shared rest of it, from 0 on. Rising
                ones are fast.

        Returns:
            The batches, on the CPU; ``None`` in the place of one that the rank does not have.

        Raises:
            ValueError: If the batches can never be known; see :meth:`why_unknown`.

        """
        if self._order is None or self._order.beginning is None:
            raise ValueError(self._why_never() or "the epoch has not begun")
        self._follow(self._order.beginning)
        kept = self._kept.get(rank, {})
        with _same_random_numbers():
            batches = {i: kept[i] if i in kept else self._load(rank, i) for i in positions}
        self._kept[rank] = batches
        return [copy.deepcopy(batches[i]) for i in positions]

    def close(self) -> None:
        """Forget the batches, and end the processes that load them."""
        for rank in [*self._iterators]:
            self._end(rank)
        self._kept, self._drawn = {}, {}

    # -- whether they are known ----------------------------------------------------------------------------------

    def why_unknown(self, rank: int, position: int) -> str | None:
        """Return why the batches of other ranks cannot be known, and what would help; ``None`` if they can.

        More is known once an epoch has begun: whether a copy draws the order again that was drawn, and whether it is
        that of the others. Ask while all ranks that are not missing are in the same step.

        Args:
            rank: Another rank. It takes time to draw an order of millions of samples, so that drawn for it serves
                :meth:`batches`, too.
            position: The number of the batch that will be asked for; negative before the first one.

        """
        beginning = self._order.beginning if self._order is not None else None
        if beginning is None:
            return self._why_never()
        self._follow(beginning)
        if beginning.share is None and self._verdict is None:
            with _same_random_numbers():
                self._verdict = self._why_never() or self._why_not_now(beginning, rank, position) or ""
        return self._verdict or self._why_not_one_order(beginning)

    def _follow(self, beginning: Beginning) -> None:
        """Begin anew in another epoch."""
        if beginning is not self._beginning:
            self.close()
            self._beginning, self._verdict = beginning, None

    def _why_never(self) -> str | None:
        loader = self.loader
        if not isinstance(loader, DataLoader):
            return f"{type(loader).__name__} is no DataLoader of torch; use one with a DistributedSampler"
        if not is_indexed(loader):
            return f"{type(loader.dataset).__name__} has no indices; use a map-style dataset"
        if not knows_rank(self._order.own, self._rank, self._size):
            return (
                f"{_names(self._order.own)} does not know its rank, so each rank has an order of its own; use a "
                "DistributedSampler, or give your sampler the attributes `rank` and `num_replicas`"
            )
        return None

    def _why_not_now(self, beginning: Beginning, rank: int, position: int) -> str | None:
        name = _names(self._order.own)
        # Some may be loaded ahead, even before there is a present one.
        position = max(position, 0)
        number, item = self._order.latest or (position, None)
        first = min(position, number)
        try:
            again = self._order_of(self._rank, first)
            here = again.draw()
            found = next(itertools.islice(again, number - first, None), None)
            is_drawn_alike = again.beginning is None or again.beginning.draws_global == beginning.draws_global
            if not is_drawn_alike or (item is not None and not _same(found, item)):
                return f"{name} does not draw the same order again; let it depend on its epoch and generator only"
            order = self._order_of(rank, first)
            makes_no_difference = here is not None and _same(here, order.draw()) and self._are_all_the_same()
            if makes_no_difference and len(self.loader.dataset) > np.asarray(here, dtype=object).size:
                return f"the order of {name} does not depend on its rank; use a DistributedSampler"
            self._drawn[rank] = order, first
        except Exception as error:
            return f"a copy of {name} fails ({error!r}); use a DistributedSampler"
        return None

    def _why_not_one_order(self, beginning: Beginning) -> str | None:
        answers = [self._agrees(rank) for rank in range(self._size)] if beginning.states else []
        is_in_doubt = beginning.draws_global and None in answers
        if False not in answers and not is_in_doubt:
            return None
        kind = "a global random generator" if beginning.draws_global else "a random generator"
        return (
            f"{_names(self._order.own)} draws from {kind}, and another rank's {'may be' if is_in_doubt else 'is'} "
            "in another state; give it a torch.Generator with the same seed on all ranks"
        )

    def _are_all_the_same(self) -> bool:
        """Return whether all ranks have the same order."""
        pairs = (
            itertools.zip_longest(self._order_of(self._rank, 0), self._order_of(rank, 0))
            for rank in range(self._size)
            if rank != self._rank
        )
        return all(_same(a, b) for a, b in itertools.chain.from_iterable(pairs))

    # -- the order of a rank -------------------------------------------------------------------------------------

    def _load(self, rank: int, position: int) -> Any:
        if rank not in self._iterators or self._iterators[rank][0] != position:
            self._end(rank)
            order, first = self._drawn.pop(rank, (None, position))
            loader = (order if order is not None and first == position else self._order_of(rank, position)).loader
            self._iterators[rank] = position, iter(loader), loader
        _, iterator, loader = self._iterators[rank]
        batch = next(iterator, None)
        self._iterators[rank] = position + 1, iterator, loader
        return batch

    def _end(self, rank: int) -> None:
        """End the processes that load the batches of a rank."""
        if rank in self._iterators:
            # They end with their iterator, which the loader may hold, too.
            forget_iterator(self._iterators.pop(rank)[2])

    def _order_of(self, rank: int, first: int) -> EpochOrder:
        """Return the order of a copy of the loader, which begins behind the first batches of a rank."""
        beginning = self._beginning
        assert beginning is not None
        loader = copy.copy(self.loader)
        # A generator of its own gives the seeds of its workers.
        vars(loader).update(generator=torch.Generator(), persistent_workers=False)
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        own = self._order.own if beginning.sampler is None else beginning.sampler
        vars(loader)[name] = copied(own, loader.dataset, self._rank, self._size, rank)
        forget_iterator(loader)
        order = EpochOrder(loader)
        if beginning.share is not None:
            order.begin_with(beginning.share, rank, first)
        else:
            order.begin_at({"began": beginning.global_states, "now": {}}, first)
        return order


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Return a context behind which the random generators are as they were."""
    kept = kept_generators()
    try:
        yield
    finally:
        set_random_generators(kept())


def _same(a: Any, b: Any) -> bool:
    """Return whether two items of samplers are equal: an index, or those of a batch."""
    return bool(np.array_equal(np.asarray(a, dtype=object), np.asarray(b, dtype=object)))


def _names(sampler: Any) -> str:
    """Return the names of a sampler's class and of those inside it."""
    names = [type(each).__name__ for each in chain(sampler)]
    return f"{names[0]} of {names[1]}" if len(names) > 1 else names[0]
