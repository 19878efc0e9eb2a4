"""The order of a loader's samples: how it began in this epoch, and how to begin it again in the middle.

For a dataset with indices, the order of an epoch is a function of the sampler, its epoch, and the states of the random
generators that it draws from. So an interrupted epoch can continue without loading what is already done: set these
states as they were when the epoch began, let the sampler draw, and skip indices.
"""

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from typing_extensions import override

from lightning_scar.core.private import forget_iterator
from lightning_scar.core.random_generators import (
    cpu_generators,
    generator_state,
    kept_generators,
    same_state,
    set_generator_state,
    set_random_generators,
    state_digest,
)
from lightning_scar.core.samplers import copied, generators, is_divided

#: Gives the batches of a rank: indices of samples.
Share = Callable[[int], list[list[int]]]

#: The state of an order of which nothing is known.
NO_STATE: dict[str, Any] = {"began": {}, "now": {}}


@dataclass(frozen=True, eq=False)
class Beginning:
    """How an epoch began that several ranks divide: the order of each of them follows from it.

    Attributes:
        sampler: This rank's sampler as it was then, a copy; ``None`` with a ``share``.
        share: Gives the batches of a rank, if the rest of an epoch was shared out.
        states: The states of random generators that the order depends on; by name, those that are global.

    """

    sampler: Any
    share: Share | None = None
    states: Mapping[Any, Any] = field(default_factory=dict)

    @property
    def draws_global(self) -> bool:
        """Whether the order depends on random generators that the sampler does not own."""
        return bool(self.global_states)

    @property
    def global_states(self) -> dict[str, Any]:
        """The states of such generators."""
        return {key: state for key, state in self.states.items() if isinstance(key, str)}

    def digest(self) -> str:
        """Return a text that is the same on all ranks whose generators are: they divide one order."""
        return state_digest(dict(self.states))


class OwnGenerators:
    """The random generators that a loader and its samplers own.

    A loader with a ``state_dict`` may leave out those of samplers that it does not know.

    Args:
        loader: The loader.
        sampler: Its batch sampler or sampler.

    """

    def __init__(self, loader: Any, sampler: Any) -> None:
        self.loader = loader
        self.own = sampler
        own = getattr(loader, "generator", None)
        inner = [each for each in generators(sampler) if each is not own]
        self._generators = [*([own] if own is not None else []), *inner]
        self._began: dict[Any, Any] = {}
        #: How the present epoch began; ``None`` if ranks do not divide it.
        self.beginning: Beginning | None = None
        #: Called with it.
        self.on_begin: Callable[[Beginning], object] | None = None
        #: The last item of the present epoch that was asked for, and its number, if this is known.
        self.latest: tuple[int, Any] | None = None

    def states(self) -> dict[Any, Any]:
        """Return the present states of the generators."""
        return {i: generator_state(own) for i, own in enumerate(self._generators)}

    def before(self) -> tuple[dict[Any, Any], Any]:
        """Return what :meth:`begin` needs: :meth:`states`, and a copy of a sampler that ranks divide.

        If it cannot be copied, the sampler stands for itself.
        """
        if not is_divided(self.own):
            return self.states(), None
        with suppress(Exception):
            return self.states(), copied(self.own, self.loader.dataset)
        return self.states(), self.own

    def begin(self, before: tuple[dict[Any, Any], Any]) -> None:
        """Note that an epoch has begun in a place :meth:`before`."""
        self._began, sampler = before
        self._begin(sampler, self._began)

    def _begin(self, sampler: Any, states: Mapping[Any, Any], share: Share | None = None) -> None:
        self.beginning = Beginning(sampler, share, states) if sampler is not None or share is not None else None
        if self.beginning is not None and self.on_begin is not None:
            self.on_begin(self.beginning)

    def state(self) -> dict[str, Any]:
        """Return what the order of the present epoch depends on: values and tensors.

        Returns:
            ``"began"``: the states of generators when the epoch began; ``"now"``: the present states of the own ones.

        """
        return {"began": self._began, "now": self.states()}

    def begin_next(self, state: Mapping[str, Any]) -> None:
        """Let the next epoch be the one after a :meth:`state`."""
        self._set_own(state["now"])

    def begin_at(self, state: Mapping[str, Any], done: int) -> None:
        """Let the next epoch be the one of a :meth:`state`, of which ``done`` batches are done."""
        self._set_own(state["began"])

    def remove(self) -> None:
        """Stop following the loader."""

    def _set_own(self, states: Mapping[Any, Any]) -> None:
        for i, own in enumerate(self._generators):
            if i in states:
                set_generator_state(own, states[i])


class EpochOrder(OwnGenerators):
    """A loader's batch sampler that can begin in the middle of an epoch.

    It takes the place of the loader's own, or of its sampler if the loader makes no batches.

    Args:
        loader: A loader of a dataset with indices.
        ahead: The number of items that are loaded in this process before they are needed.

    Example::

        >>> loader = DataLoader(range(6), batch_size=1, shuffle=True)
        >>> order = EpochOrder(loader)
        >>> epoch = list(loader)
        >>> order.begin_at(order.state(), done=4)
        >>> list(loader) == epoch[4:]
        True

    """

    def __init__(self, loader: "DataLoader[Any]", ahead: int = 0) -> None:
        self._name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        super().__init__(loader, getattr(loader, self._name))
        self._place: tuple[dict[str, Any], int, Mapping[str, Any] | None] | None = None
        self._rest: tuple[Share, int, int, Mapping[Any, Any]] | None = None
        self._drawn: Iterator[Any] | None = None
        #: The last items that were asked for, and the states of the global generators then.
        self._asked: deque[tuple[int, Callable[[], dict[str, Any]]]] = deque(maxlen=ahead)
        # DataLoader forbids setting the attribute. Its iterators keep the sampler that they started with.
        vars(loader)[self._name] = self
        forget_iterator(loader)

    def __len__(self) -> int:
        """Return the length of a whole epoch."""
        return len(self.own)

    def __getattr__(self, name: str) -> Any:
        """Be the sampler in everything else."""
        if name == "own":
            raise AttributeError(name)  # A copy is being made, which has no attributes yet.
        return getattr(self.own, name)

    @override
    def before(self) -> tuple[dict[Any, Any], Any]:
        return {}, None

    @override
    def begin(self, before: tuple[dict[Any, Any], Any]) -> None:
        """Do nothing: an epoch begins when its first index is drawn."""

    @override
    def remove(self) -> None:
        """Give the loader its own sampler back."""
        if vars(self.loader).get(self._name) is self:
            vars(self.loader)[self._name] = self.own

    @override
    def begin_at(self, state: Mapping[str, Any], done: int, then: Mapping[str, Any] | None = None) -> None:
        """Let the next epoch be the one of a :meth:`state`, without what is done.

        Args:
            state: The state.
            done: The number of items to skip.
            then: The states of the global generators when its first item is asked for; by default, what they are. With
                ``state["ahead"]``, the items that were loaded ahead begin with those, and ``then`` is for what follows.

        """
        self._place = dict(state), done, then

    def begin_with(self, share: Share, rank: int, done: int = 0, state: Mapping[str, Any] = NO_STATE) -> None:
        """Let the next epoch consist of the given batches.

        Args:
            share: Gives the batches of each rank.
            rank: The rank of this process.
            done: The number of its batches to skip.
            state: The :meth:`state` of the epoch whose rest they are; the generators are then as behind its order.

        """
        self._rest = share, rank, done, state["now"]

    def draw(self) -> Any:
        """Draw the order of the next epoch now; return its first item, or ``None`` if it has none."""
        items = iter(self)
        first = list(itertools.islice(items, 1))
        self._drawn = itertools.chain(first, items)
        return first[0] if first else None

    def loaded_ahead(self, done: int) -> Callable[[], dict[str, Any]] | None:
        """Return what gives the states of the global generators when an item was asked for; ``None`` if it was not."""
        return next((kept for item, kept in self._asked if item == done), None)

    # -- an epoch ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        """Yield the items of an epoch, or of its rest."""
        # A generator, because loaders with workers make two iterators, and use the second one only.
        place, self._place = self._place, None
        rest, self._rest = self._rest, None
        drawn, self._drawn = self._drawn, None
        if drawn is not None:
            yield from drawn
        elif rest is not None:
            share, rank, done, now = rest
            # A loader has drawn from them when it began.
            self._set_own(now)
            self._begin(None, {}, share)
            for self.latest in enumerate(share(rank)[done:], done):
                yield self.latest[1]
        elif place is None:
            yield from self._noted(self._items(0), 0)
        else:
            state, done, then = place
            # The program has drawn other numbers from the global generators since the epoch began.
            present = then or cpu_generators()
            self._set_own({**state["now"], **state["began"]})
            set_random_generators({key: value for key, value in state["began"].items() if isinstance(key, str)})
            items = self._noted(self._items(done), done)
            if ahead := state.get("ahead"):
                set_random_generators(ahead)
                yield from itertools.islice(items, self._asked.maxlen)
            set_random_generators(present)
            yield from items

    def _noted(self, items: Iterator[Any], first: int) -> Iterator[Any]:
        """Yield items, and note with which random numbers each is loaded."""
        self._asked.clear()
        for number, item in enumerate(items, first):
            if self._asked.maxlen:
                self._asked.append((number, kept_generators()))
            self.latest = number, item
            yield item

    def _items(self, done: int) -> Iterator[Any]:
        """Return an iterator over what is not done, after the order is drawn."""
        sampler = self.own
        # Without making lists of what is skipped.
        by_index = done > 0 and type(sampler) is BatchSampler
        skipped = done * sampler.batch_size if by_index else done
        before, (_, copy) = self._states(), super().before()
        items = iter(sampler.sampler if by_index else sampler)
        first = list(itertools.islice(items, 1))
        after = self._states()
        self._began = {key: state for key, state in before.items() if not same_state(state, after[key])}
        self._begin(copy, self._began)
        if not skipped:
            return itertools.chain(first, items)
        deque(itertools.islice(items, skipped - 1), maxlen=0)
        if not all(same_state(state, after[key]) for key, state in cpu_generators().items()):
            warnings.warn(
                f"lightning-scar: {type(sampler).__name__} draws from a global random generator throughout the epoch, "
                "so its order cannot continue where it was: some samples will be repeated and others skipped. Let it "
                "draw from a torch.Generator of its own.",
                stacklevel=2,
            )
        return iter(BatchSampler(items, sampler.batch_size, sampler.drop_last)) if by_index else items

    def _states(self) -> dict[Any, Any]:
        return {**cpu_generators(), **self.states()}


def is_indexed(loader: Any) -> bool:
    """Return whether a loader serves a dataset with indices, so that an :class:`EpochOrder` can place it."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
