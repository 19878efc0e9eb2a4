"""The order of a loader's samples: how it began in this epoch, and how to begin it again in the middle.

For a dataset with indices, the order of an epoch is a function of the sampler, its epoch, and the states of the random
generators that it draws from. So an interrupted epoch can continue without loading what is already done: set these
states as they were when the epoch began, let the sampler draw, and skip indices.
"""

import itertools
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from lightning_scar.core.random_generators import (
    Generator,
    cpu_generators,
    generator_state,
    same_state,
    set_generator_state,
    set_random_generators,
)


class EpochOrder:
    """A loader's batch sampler that can begin in the middle of an epoch.

    It takes the place of the loader's own, or of its sampler if the loader makes no batches.

    Args:
        loader: A loader of a dataset with indices.

    Example::

        >>> loader = DataLoader(range(6), batch_size=1, shuffle=True)
        >>> order = EpochOrder(loader)
        >>> epoch = list(loader)
        >>> order.begin_at(order.state(), done=4)
        >>> list(loader) == epoch[4:]
        True

    """

    def __init__(self, loader: "DataLoader[Any]") -> None:
        self._loader = loader
        self._name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self.sampler: Any = getattr(loader, self._name)
        own = [loader.generator] if loader.generator is not None else []
        self._generators = [*own, *(each for each in _generators(self.sampler) if each is not loader.generator)]
        # DataLoader forbids setting the attribute. Its iterators keep the sampler that they started with.
        vars(loader)[self._name] = self
        self._began: dict[Any, Any] = {}
        self._place: tuple[dict[str, Any], int] | None = None
        self._rest: list[Any] | None = None

    def __len__(self) -> int:
        """Return the length of a whole epoch."""
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        """Be the sampler in everything else."""
        if name == "sampler":
            raise AttributeError(name)  # A copy is being made, which has no attributes yet.
        return getattr(self.sampler, name)

    def remove(self) -> None:
        """Give the loader its own sampler back."""
        if vars(self._loader).get(self._name) is self:
            vars(self._loader)[self._name] = self.sampler

    # -- the place -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what the order of the present epoch depends on: values and tensors.

        Returns:
            ``"began"``: the states of the generators that the epoch was drawn from, right before the first index.
            ``"now"``: the present states of the sampler's and the loader's own generators.

        """
        return {"began": self._began, "now": {i: generator_state(own) for i, own in enumerate(self._generators)}}

    def begin_next(self, state: Mapping[str, Any]) -> None:
        """Let the next epoch be the one after a :meth:`state`."""
        self._set_own(state["now"])

    def begin_at(self, state: Mapping[str, Any], done: int) -> None:
        """Let the next epoch be the one of a :meth:`state`, without what is done.

        Args:
            state: The state.
            done: The number of items to skip.

        """
        self._place = dict(state), done

    def begin_with(self, rest: list[list[int]]) -> None:
        """Let the next epoch consist of the given batches."""
        self._rest = rest

    # -- an epoch ------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        """Yield the items of an epoch, or of its rest."""
        # A generator, because loaders with workers make two iterators, and use the second one only.
        place, self._place = self._place, None
        rest, self._rest = self._rest, None
        if rest is not None:
            yield from rest
        elif place is not None:
            yield from self._rest_of(*place)
        else:
            yield from self._whole()

    def _whole(self) -> Iterator[Any]:
        before = self._states()
        items = iter(self.sampler)
        first = list(itertools.islice(items, 1))
        after = self._states()
        self._began = {key: state for key, state in before.items() if not same_state(state, after[key])}
        return itertools.chain(first, items)

    def _rest_of(self, state: dict[str, Any], done: int) -> Iterator[Any]:
        # The program has drawn other numbers from the global generators since the epoch began.
        present = cpu_generators()
        self._began = began = state["began"]
        self._set_own({**state["now"], **began})
        set_random_generators({**present, **{key: value for key, value in began.items() if key in present}})
        items = self._whole_but(done)
        first = list(itertools.islice(items, 1))
        set_random_generators(present)
        return itertools.chain(first, items)

    def _whole_but(self, done: int) -> Iterator[Any]:
        sampler = self.sampler
        if type(sampler) is not BatchSampler:
            return self._skipped(iter(sampler), done)
        # Without making lists of what is skipped.
        indices = self._skipped(iter(sampler.sampler), done * sampler.batch_size)
        return iter(BatchSampler(indices, sampler.batch_size, sampler.drop_last))  # type: ignore[arg-type]

    def _skipped(self, items: Iterator[Any], number: int) -> Iterator[Any]:
        _consume(items, min(number, 1))
        drawn = cpu_generators()
        _consume(items, max(number - 1, 0))
        if not same_state(drawn, cpu_generators()):
            warnings.warn(
                f"lightning-scar: {type(self.sampler).__name__} draws from a global random generator throughout the "
                "epoch, so its order cannot continue where it was: some samples will be repeated and others skipped. "
                "Let it draw from a torch.Generator of its own.",
                stacklevel=2,
            )
        return items

    def _states(self) -> dict[Any, Any]:
        return {**cpu_generators(), **{i: generator_state(own) for i, own in enumerate(self._generators)}}

    def _set_own(self, states: Mapping[Any, Any]) -> None:
        for i, own in enumerate(self._generators):
            if i in states:
                set_generator_state(own, states[i])


def has_order(loader: Any) -> bool:
    """Return whether an :class:`EpochOrder` can place a loader."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    # A loader with a state places itself.
    return not hasattr(loader, "state_dict")


def _consume(items: Iterator[Any], number: int) -> None:
    deque(itertools.islice(items, number), maxlen=0)


def _generators(sampler: Any) -> list[Any]:
    """Return the random generators of a sampler and of the samplers inside it."""
    found: dict[int, Any] = {}

    def visit(value: Any) -> None:
        if id(value) in found or not hasattr(value, "__dict__"):
            return
        found[id(value)] = value
        for inner in vars(value).values():
            if isinstance(inner, Generator):
                found[id(inner)] = inner
            elif isinstance(inner, Sampler) or hasattr(inner, "_sampler"):
                visit(inner)

    visit(sampler)
    return [value for value in found.values() if isinstance(value, Generator)]
