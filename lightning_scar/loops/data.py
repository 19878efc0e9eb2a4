"""The place of a loop in its training data."""

import itertools
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import isgenerator
from typing import Any

from torch.utils.data import DataLoader

from lightning_scar.continuation.rank_orders import rank_batches
from lightning_scar.core.data_order import EpochOrder, is_indexed
from lightning_scar.core.private import forget_iterator
from lightning_scar.core.random_generators import cpu_generators, set_random_generators
from lightning_scar.core.rank_batches import RankBatches
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.shared_epoch import RestOfEpoch, not_shared_out, recipe
from lightning_scar.loops.framework import Framework


class LoopData:
    """Iterates over a loop's training data, and knows its place in them.

    Args:
        framework: The loop's framework.

    Attributes:
        epoch: The number of epochs that are done.
        loader: The loader of the present epoch; ``None`` before the first one.
        ranks: The ranks that the data are divided among, including dead ones.
        at_end: Called when this rank has no more batches in an epoch.

    """

    def __init__(self, framework: Framework) -> None:
        self.at_end: Callable[[], None] = _do_nothing
        self.epoch = 0
        self.loader: Any = None
        self.ranks = Ranks()
        self._framework = framework
        self._done = 0
        self._order: EpochOrder | None = None
        self._is_in_epoch = False
        self._shared: dict[str, Any] | None = None
        self._saved: dict[str, Any] = {}
        self._others: RankBatches | None = None

    def count(self) -> None:
        """Count a batch of the present epoch."""
        self._done += self._is_in_epoch

    # -- the place -----------------------------------------------------------------------------------------------

    def state(self, uncounted: int = 0) -> dict[str, Any]:
        """Return the place: values and tensors.

        Args:
            uncounted: The number of batches that are done and not counted yet.

        """
        state: dict[str, Any] = {"epoch": self.epoch, "done": self._done + uncounted * self._is_in_epoch}
        if self.loader is None:
            return state
        state["seed"] = self._framework.shuffle_seed(self.loader)
        state["has_begun"] = self._is_in_epoch
        # Before the first batch is done it may be the last one.
        state["is_over"] = state["done"] > 0 and self._is_in_epoch and self._framework.is_over(self.loader)
        if self._order is None:
            return {**state, "loader": self._framework.loader_state(self.loader)}
        sampler, batch_size = self._framework.whole_sampler(self._order.own)
        known = recipe(sampler)
        known = {**known, "batch_size": batch_size} if known is not None else None
        return {**state, "order": {**self._order.state(), "recipe": known, "shared": self._shared}}

    def loaded_ahead(self) -> Callable[[], dict[str, Any]] | None:
        """Return what gives the random numbers with which the next batch was loaded; ``None`` if it was not yet."""
        if not self._is_in_epoch:
            ahead = self._saved.get("ahead")
            return None if ahead is None else lambda: ahead
        if self._order is None:
            return None
        return self._order.loaded_ahead(self._done * self._framework.batches_per_fetch(self.loader))

    def load(self, state: Mapping[str, Any], before: int) -> None:
        """Continue at a place that was saved, perhaps by another number of ranks.

        Args:
            state: The :meth:`state`, with what :meth:`loaded_ahead` gave as ``"ahead"``.
            before: The number of ranks that saved it.

        """
        self.epoch, self._done = state["epoch"], state["done"]
        self._saved = {**state, "before": before}
        self._is_in_epoch = False

    # -- an epoch ------------------------------------------------------------------------------------------------

    def batches(self, loader: Any) -> Iterator[Any]:
        """Yield the batches of an epoch that are not done."""
        if self._is_in_epoch:
            # The last one was left early.
            self._end()
            self.at_end()
        saved, self._saved = self._saved, {}
        self._follow(loader)
        self._is_in_epoch, self._shared = True, None
        self._framework.set_epoch(loader, self.epoch)
        if saved.get("seed") is not None:
            self._framework.set_shuffle_seed(loader, saved["seed"])
        discarded = self._place(saved) if saved else 0
        if discarded is not None:
            yield from self._rest_of(loader, discarded) if saved and self._order is None else loader
        self._end()
        self.at_end()

    def _rest_of(self, loader: Any, discarded: int) -> Iterator[Any]:
        """Return the batches of data without indices, and let the random generators be where they were."""
        present = cpu_generators()
        batches = iter(loader)
        first: list[Any] = []
        deque(itertools.islice(batches, discarded), maxlen=0)
        if isgenerator(batches):
            # It draws what a loader draws when it begins, and only now.
            first = list(itertools.islice(batches, 1))
        set_random_generators(present)
        return itertools.chain(first, batches)

    def _follow(self, loader: Any) -> None:
        inner = self._framework.torch_loader(loader)
        if self._order is None or self._order.loader is not inner:
            self.close()
            # Workers draw random numbers of their own.
            ahead = self._framework.batches_ahead(loader) if getattr(inner, "num_workers", 0) == 0 else 0
            self._order = EpochOrder(inner, ahead) if is_indexed(inner) else None
            self._others = rank_batches(inner, self._order, self.ranks.rank, self.ranks.world_size)
        self.loader = loader

    def _end(self) -> None:
        self.epoch += 1
        self._done, self._is_in_epoch = 0, False

    def close(self) -> None:
        """Give the loader back as it was."""
        self.release_batches()
        if self._order is not None:
            self._order.remove()

    def _place(self, saved: Mapping[str, Any]) -> int | None:
        """Let the loader begin behind what is done.

        Returns:
            The number of batches to load and discard; ``None`` if nothing is left of the epoch.

        """
        state, ranks = saved.get("order"), self.ranks
        is_over = saved.get("is_over") or self._done >= (sized_len(self.loader) or math.inf)
        if is_over and saved["before"] == ranks.world_size:
            if self._order is not None and state is not None and state["shared"]:
                self._order.begin_next(state)
            elif self._order is not None and state is not None:
                # Samplers may draw once more behind their last index.
                self._begin_at(state)
                deque(self._order, maxlen=0)
            elif isinstance(inner := self._framework.torch_loader(self.loader), DataLoader):
                # An iterator that was made for its state would draw nothing in the next epoch.
                forget_iterator(inner)
            return None
        if self._order is None or state is None:
            return self._place_by_state(saved)
        sampler, batch_size = self._framework.whole_sampler(self._order.own)
        is_divided_anew = (state["recipe"] or {}).get("batch_size") != (batch_size if recipe(sampler) else None)
        if state["shared"] and saved["before"] == ranks.world_size and not is_divided_anew:
            return self._begin_rest(RestOfEpoch.of_state(state["shared"]), state, self._done)
        if saved["before"] != ranks.world_size or is_divided_anew or state["shared"]:
            return self._share_out(state, saved["before"])
        if self._done or saved.get("has_begun"):
            self._begin_at({**state, "ahead": saved.get("ahead")})
        else:
            self._order.begin_next(state)
        return 0

    def _begin_at(self, state: Mapping[str, Any]) -> None:
        assert self._order is not None
        each = self._framework.batches_per_fetch(self.loader)
        # A loader draws a number when it begins, as it did when the epoch began.
        self._order.begin_at(state, self._done * each, then=cpu_generators())

    def _place_by_state(self, saved: Mapping[str, Any]) -> int:
        is_same_ranks = saved["before"] == self.ranks.world_size
        if not is_same_ranks:
            self._done = self._done * int(saved["before"]) // self.ranks.world_size
        if saved.get("loader") is None or not is_same_ranks:
            return self._done
        self._framework.load_loader_state(self.loader, saved["loader"])
        return 0

    def _share_out(self, state: Mapping[str, Any], before: int) -> int | None:
        assert self._order is not None
        sampler, _ = self._framework.whole_sampler(self._order.own)
        rest = RestOfEpoch.of(state, self._done, before, sampler)
        if rest is not None:
            return self._begin_rest(rest, state)
        self._done = self._done * before // self.ranks.world_size
        self._begin_at(state)
        if self.ranks.rank == 0:
            warnings.warn(not_shared_out(before, self.ranks.world_size), stacklevel=4)
        return 0

    def _begin_rest(self, rest: RestOfEpoch, state: Mapping[str, Any], done: int = 0) -> int | None:
        """Let the loader serve this rank's share of the rest of an epoch, behind the batches of it that are done."""
        assert self._order is not None
        sampler, batch_size = self._framework.whole_sampler(self._order.own)
        rank, size = self._framework.share(self.loader, self.ranks)
        share = rest.share(size, batch_size, sampler.drop_last)
        skipped = done * self._framework.batches_per_fetch(self.loader)
        self._shared, self._done = {**rest.state(), "at": 0}, done
        if skipped >= len(share(rank)):
            self._order.begin_next(state)
            return None
        self._order.begin_with(share, rank, skipped, state)
        return 0

    @property
    def has_just_begun(self) -> bool:
        """Whether the first batch of an epoch is not done yet."""
        return self._is_in_epoch and self._done == 0

    # -- other ranks ---------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """The number of the present batch in its epoch, or in the shared rest of it, from 0 on."""
        return self._done

    def why_batches_unknown(self, rank: int, position: int) -> str | None:
        """Return why the batches of other ranks in the present epoch cannot be known; ``None`` if they can.

        Args:
            rank: The first whose batches will be asked for.
            position: The number of the first of these.

        """
        if self._others is None:
            return "the loop does not take its batches from `scar.batches(loader)`, which would know their order"
        return self._others.why_unknown(rank, position)

    def batches_of(self, rank: int, positions: Iterable[int]) -> list[Any]:
        """Return batches of another rank in the present epoch, as its loader gives them.

        Args:
            rank: Its rank among all.
            positions: Their numbers, as in :attr:`position`.

        Returns:
            The batches; ``None`` in the place of one that the rank does not have.

        """
        assert self._others is not None
        batches = self._others.batches(rank, list(positions))
        return [None if batch is None else self._framework.given(self.loader, batch) for batch in batches]

    def release_batches(self) -> None:
        """Forget the batches of other ranks, and end the processes that load them."""
        if self._others is not None:
            self._others.close()


def _do_nothing() -> None:
    """Do nothing."""


def sized_len(loader: Any) -> int | None:
    """Return the length of a loader; ``None`` if it has none."""
    try:
        return len(loader)
    except TypeError:
        return None
