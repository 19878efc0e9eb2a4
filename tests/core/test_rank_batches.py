"""A rank knows the batches of every other rank, and knowing them changes nothing of its own."""

import itertools
import multiprocessing
import pickle
import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from core_helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from lightning_scar.core.data_order import EpochOrder, OwnGenerators
from lightning_scar.core.private import forget_iterator
from lightning_scar.core.random_generators import random_generators
from lightning_scar.core.rank_batches import RankBatches
from lightning_scar.core.samplers import chain
from lightning_scar.core.shared_epoch import RestOfEpoch, recipe

#: Makes the loader of a rank: its number, the number of ranks, the dataset, and what the example says.
Make = Callable[[int, int, Any, dict[str, Any]], DataLoader[Any]]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distributed(rank: int, size: int, data: Any, how: dict[str, Any], kind: Any = DistributedSampler) -> Any:
    return kind(data, size, rank, shuffle=how["shuffle"], seed=how["seed"], drop_last=how["drop_last"])


def of_torch(rank: int, size: int, data: Any, how: dict[str, Any]) -> DataLoader[Any]:
    sampler = distributed(rank, size, data, how)
    return DataLoader(data, batch_size=how["batch_size"], sampler=sampler, drop_last=how["drop_last"])


def batch_sampler(rank: int, size: int, data: Any, how: dict[str, Any]) -> DataLoader[Any]:
    sampler = distributed(rank, size, data, how)
    return DataLoader(data, batch_sampler=BatchSampler(sampler, how["batch_size"], how["drop_last"]))


def no_batches(rank: int, size: int, data: Any, how: dict[str, Any]) -> DataLoader[Any]:
    return DataLoader(data, batch_size=None, sampler=distributed(rank, size, data, how))


def stateful(rank: int, size: int, data: Any, how: dict[str, Any]) -> DataLoader[Any]:
    sampler = distributed(rank, size, data, how, StatefulDistributedSampler)
    loader: Any = StatefulDataLoader(data, batch_size=how["batch_size"], sampler=sampler, drop_last=how["drop_last"])
    return loader  # type: ignore[no-any-return]


def wrapped(rank: int, size: int, data: Any, how: dict[str, Any]) -> DataLoader[Any]:
    inner = WeightedRandomSampler(range(1, len(data) + 1), len(data), generator=generator(how["seed"]))
    sampler = DistributedSamplerWrapper(inner, num_replicas=size, rank=rank, shuffle=False)
    return DataLoader(data, batch_size=how["batch_size"], sampler=sampler, drop_last=how["drop_last"])


def accelerated(rank: int, size: int, data: Any, how: dict[str, Any], **kind: Any) -> DataLoader[Any]:
    sampler: Any = SequentialSampler(data)
    if how["shuffle"]:
        sampler = RandomSampler(data, generator=generator(how["seed"]))
    batches = BatchSampler(sampler, how["batch_size"], how["drop_last"])
    return DataLoader(data, batch_sampler=BatchSamplerShard(batches, size, rank, **kind))


def uneven(rank: int, size: int, data: Any, how: dict[str, Any]) -> DataLoader[Any]:
    return accelerated(rank, size, data, how, even_batches=False)


def split(rank: int, size: int, data: Any, how: dict[str, Any]) -> DataLoader[Any]:
    how = {**how, "batch_size": size * how["batch_size"]}
    return accelerated(rank, size, data, how, split_batches=True)


def seedable(rank: int, size: int, data: Any, how: dict[str, Any]) -> DataLoader[Any]:
    sampler = SeedableRandomSampler(data, data_seed=how["seed"])
    batches = BatchSampler(sampler, how["batch_size"], how["drop_last"])
    return DataLoader(data, batch_sampler=BatchSamplerShard(batches, size, rank))


class Shuffled:
    """A user's sampler: not one of torch, it shuffles a list of lists in place, and changes itself as it goes."""

    def __init__(self, data: Any, rank: int, world_size: int, seed: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.pairs = [[i, (i + 1) % len(data)] for i in range(len(data))]
        self.random = random.Random(seed)
        self.numpy = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[int]:
        self.random.shuffle(self.pairs)
        for pair in self.pairs:
            self.numpy.shuffle(pair)
        for number, pair in enumerate(self.pairs):
            chosen = pair[self.random.randrange(2)]
            if number % self.world_size == self.rank:
                yield chosen
        self.pairs.reverse()

    def __len__(self) -> int:
        return len(self.pairs[self.rank :: self.world_size])


def of_a_user(rank: int, size: int, data: Any, how: dict[str, Any]) -> DataLoader[Any]:
    sampler: Any = Shuffled(data, rank, size, how["seed"])
    return DataLoader(data, batch_size=how["batch_size"], sampler=sampler, drop_last=how["drop_last"])


KINDS: list[Make] = [
    of_torch,
    batch_sampler,
    no_batches,
    stateful,
    wrapped,
    accelerated,
    uneven,
    split,
    seedable,
    of_a_user,
]


def set_epoch(loader: Any, epoch: int) -> None:
    for sampler in chain(loader.batch_sampler or loader.sampler):
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)


def epochs(loader: Any, first: int, last: int) -> Iterator[list[Any]]:
    for epoch in range(first, last):
        set_epoch(loader, epoch)
        yield list(loader)


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    size = draw(st.integers(2, 5))
    return {
        "size": size,
        "rank": draw(st.integers(0, size - 1)),
        # Enough for a rank to make a difference.
        "length": draw(st.integers(10, 60)),
        "batch_size": draw(st.integers(1, 4)),
        "drop_last": draw(st.booleans()),
        "shuffle": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
        "epoch": draw(st.integers(0, 2)),
    }


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@settings(max_examples=12)
@given(how=situations(), data=st.data())
def test_each_rank_derives_what_the_loaders_of_the_others_serve(make: Make, how: dict[str, Any], data: Any) -> None:
    size, rank, samples = how["size"], how["rank"], list(range(how["length"]))
    served = [[*epochs(make(i, size, samples, how), 0, how["epoch"] + 1)] for i in range(size)]
    loader = make(rank, size, samples, how)
    order = EpochOrder(loader)
    others = RankBatches(loader, order, rank, size)
    assert_same([*epochs(loader, 0, how["epoch"])], served[rank][:-1])
    set_epoch(loader, how["epoch"])
    iterator, present = iter(loader), served[rank][-1]
    done = data.draw(st.integers(1, max(len(present), 1)), label="done")
    seen = [*itertools.islice(iterator, done)]
    if not seen:
        return
    before = random_generators()
    assert others.why_unknown(1, 0) is None
    asked = data.draw(st.lists(st.integers(0, len(present)), max_size=4), label="asked")
    for position in (done - 1, done - 1, done, *asked):
        for other in range(size):
            expected = dict(enumerate(served[other][-1])).get(position)
            (found,) = others.batches(other, [position])
            assert_same(found, expected)
            # A step can be repeated.
            assert_same(others.batches(other, [position]), [expected])
    assert_same(random_generators(), before)
    seen += iterator
    assert_same(seen, present)
    # And the epoch behind.
    set_epoch(loader, how["epoch"] + 1)
    again = make(rank, size, samples, how)
    assert_same(list(loader), [*epochs(again, 0, how["epoch"] + 2)][-1])


# -- loaders ----------------------------------------------------------------------------------------------------------


def collate(items: list[Any]) -> dict[str, Any]:
    worker = torch.utils.data.get_worker_info()
    return {"samples": items, "worker": None if worker is None else worker.id, "noted": NOTED[-1]}


#: What an initial function of workers has noted, in their process.
NOTED = ["nothing"]


def note(worker: int) -> None:
    NOTED.append(f"worker {worker}")


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("stays", [False, True])
def test_others_are_loaded_as_this_rank_loads(kind: Any, stays: bool) -> None:
    samples = list(range(40))
    options = {"num_workers": 2, "collate_fn": collate, "worker_init_fn": note, "persistent_workers": stays}
    loaders = [
        kind(samples, batch_size=3, sampler=DistributedSampler(samples, 2, i), prefetch_factor=1, **options)
        for i in range(2)
    ]
    served = [list(each) for each in loaders]
    assert {batch["noted"] for batch in served[1]} == {"worker 0", "worker 1"}
    others = RankBatches(loaders[0], order := EpochOrder(loaders[0]), 0, 2)
    own = iter(loaders[0])
    first = next(own)
    before = {process.pid for process in multiprocessing.active_children()}
    assert order.latest is not None
    # In order, by jumps, and beyond the end.
    for place in (0, 1, 2, 5, 6, 3, 7):
        (batch,) = others.batches(1, [place])
        expected = dict(enumerate(served[1])).get(place)
        assert (batch and batch["samples"]) == (expected and expected["samples"])
        assert batch is None or batch["noted"].startswith("worker")
    others.batches(1, [0])
    assert {process.pid for process in multiprocessing.active_children()} > before
    others.close()
    assert {process.pid for process in multiprocessing.active_children()} == before
    assert [each["samples"] for each in (first, *own)] == [each["samples"] for each in served[0]]
    for loader in loaders:
        # In a cycle of references, workers that stay would end by a timeout.
        forget_iterator(loader)


class Noisy(Dataset[Any]):
    """Its items draw from all global generators."""

    def __getitem__(self, i: int) -> float:
        return i + random.random() + float(np.random.rand()) + float(torch.rand(()))

    def __len__(self) -> int:
        return 20


def test_random_items_of_others_leave_the_random_numbers_alone() -> None:
    data = Noisy()
    loader = DataLoader(data, batch_size=2, sampler=DistributedSampler(data, 2, 0))
    others = RankBatches(loader, EpochOrder(loader), 0, 2)
    next(iter(loader))
    before = random_generators()
    assert len(others.batches(1, [0, 1, 4])) == 3
    assert_same(random_generators(), before)


class Counted(DistributedSampler[Any]):
    """Counts how often an order is drawn, by its copies as well."""

    drawn: ClassVar[list[int]] = []

    def __iter__(self) -> Iterator[int]:
        self.drawn.append(self.rank)
        return iter([*super().__iter__()])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_of_another_rank_is_drawn_once_to_be_checked_and_loaded(workers: int) -> None:
    samples = list(range(40))
    served = list(DataLoader(samples, batch_size=2, sampler=Counted(samples, 2, 1)))
    loader = DataLoader(samples, batch_size=2, sampler=Counted(samples, 2, 0), num_workers=workers)
    others = RankBatches(loader, EpochOrder(loader), 0, 2)
    own = iter(loader)
    deque(itertools.islice(own, 3), maxlen=0)
    Counted.drawn.clear()
    assert others.why_unknown(1, 2) is None
    for position in (2, 3, 4):
        assert_same(others.batches(1, [position]), [served[position]])
    assert Counted.drawn == [0, 1]
    others.close()


def test_they_are_known_before_the_first_one_when_workers_load_ahead() -> None:
    samples = list(range(40))
    loader = DataLoader(samples, batch_size=2, sampler=DistributedSampler(samples, 2, 0), num_workers=1)
    others = RankBatches(loader, EpochOrder(loader), 0, 2)
    own = iter(loader)
    assert others.why_unknown(1, -1) is None
    assert len([*own]) == 10


def test_they_are_known_before_the_first_one_of_a_loader_that_places_itself() -> None:
    samples = list(range(40))
    loader = StatefulDataLoader(samples, batch_size=2, sampler=DistributedSampler(samples, 2, 0))
    order = OwnGenerators(loader, loader.batch_sampler)
    before = order.before()
    iter(loader)
    order.begin(before)
    assert RankBatches(loader, order, 0, 2).why_unknown(1, -1) is None


def unknown(rank: int) -> None:
    return None


def test_they_can_be_pickled_while_others_are_loaded() -> None:
    """As with a Trainer that a spawned process gets."""
    samples = list(range(40))
    loader = DataLoader(samples, batch_size=2, sampler=DistributedSampler(samples, 2, 0))
    others = RankBatches(loader, EpochOrder(loader), 0, 2, unknown)
    next(iter(loader))
    assert others.why_unknown(1, 0) is None
    pickle.dumps(others)
    expected = others.batches(1, [3])
    assert_same(pickle.loads(pickle.dumps(others)).batches(1, [3]), expected)


# -- a place in the middle of an epoch --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", KINDS[:-1], ids=lambda make: make.__name__)
def test_an_epoch_that_continues_has_the_same_orders(make: Make) -> None:
    how = {"batch_size": 2, "drop_last": False, "shuffle": True, "seed": 4}
    samples, done = list(range(31)), 3
    served = [[*epochs(make(i, 3, samples, how), 0, 2)][-1] for i in range(3)]
    first = make(1, 3, samples, how)
    whole = EpochOrder(first)
    deque(epochs(first, 0, 1))
    set_epoch(first, 1)
    deque(itertools.islice(first, done), maxlen=0)
    # Another process, with other random numbers.
    torch.manual_seed(1)
    loader = make(1, 3, samples, how)
    set_epoch(loader, 1)
    order = EpochOrder(loader)
    order.begin_at(whole.state(), done)
    rest = iter(loader)
    assert_same(next(rest), served[1][done])
    others = RankBatches(loader, order, 1, 3)
    assert others.why_unknown(1, 0) is None
    for rank in range(3):
        assert_same(others.batches(rank, range(done + 2)), served[rank][: done + 2])
    assert_same(list(rest), served[1][done + 1 :])


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_shared_rest_of_an_epoch(drop_last: bool) -> None:
    samples = list(range(50))
    whole = BatchSampler(DistributedSampler(samples, 4, 0, seed=2), 3, drop_last)
    share = RestOfEpoch(recipe(whole) or {}, {}, done=17).share(3, 2, drop_last)
    loaders = [DataLoader(samples, batch_sampler=whole) for _ in range(3)]
    orders = [EpochOrder(loader) for loader in loaders]
    for rank, order in enumerate(orders):
        order.begin_with(share, rank)
    iterators = [*map(iter, loaders)]
    first = next(iterators[1])
    others = RankBatches(loaders[1], orders[1], 1, 3)
    assert others.why_unknown(1, 0) is None
    served = [list(iterators[0]), [first, *iterators[1]], list(iterators[2])]
    for rank in range(3):
        assert_same([others.batches(rank, [i])[0] for i in range(len(served[rank]) + 1)], [*served[rank], None])


# -- what cannot be known ---------------------------------------------------------------------------------------------


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return itertools.count()


class Ignores(Sampler[int]):
    """Has divided its samples when it was made, for good."""

    def __init__(self, rank: int, num_replicas: int) -> None:
        self.rank, self.num_replicas = rank, num_replicas
        self.own = range(30)[rank::num_replicas]

    def __iter__(self) -> Iterator[int]:
        return iter(self.own)


class Unsteady(Ignores):
    """Draws another order each time, from a source that nobody sees."""

    source = itertools.count()

    def __iter__(self) -> Iterator[int]:
        yield from [(next(self.source) + i) % 30 for i in range(self.rank, 30, self.num_replicas)]


class Unique(Ignores):
    """Cannot be copied."""

    def __copy__(self) -> Any:
        raise NotImplementedError("there is one of me")


def by_weight(seed: int | None = None) -> Any:
    own = None if seed is None else generator(seed)
    inner = WeightedRandomSampler(range(1, 31), 30, generator=own)
    return DistributedSamplerWrapper(inner, num_replicas=2, rank=0, shuffle=False)


def others_of(loader: Any, agrees: Callable[[int], bool | None] = lambda rank: None) -> RankBatches:
    order = EpochOrder(loader) if not isinstance(loader.dataset, IterableDataset) else None
    others = RankBatches(loader, order, 0, 2, agrees)
    next(iter(loader))
    return others


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: DataLoader(Endless()), "Endless has no indices; use a map-style dataset"),
        (lambda: DataLoader(range(30), shuffle=True), "BatchSampler of RandomSampler does not know its rank"),
        (lambda: loader_of(DistributedSampler(range(30), 1, 0)), "BatchSampler of DistributedSampler does not know"),
        (lambda: loader_of(Ignores(0, 2)), "the order of BatchSampler of Ignores does not depend on its rank"),
        (lambda: loader_of(Unsteady(0, 2)), "BatchSampler of Unsteady does not draw the same order again"),
    ],
)
def test_what_cannot_be_known_says_why(make: Callable[[], Any], reason: str) -> None:
    others = others_of(make())
    assert (others.why_unknown(1, 0) or "").startswith(reason)


def loader_of(sampler: Any) -> Any:
    return DataLoader(range(30), batch_size=2, sampler=sampler)  # type: ignore[arg-type]


def test_a_sampler_that_cannot_be_copied_is_followed_all_the_same() -> None:
    loader = loader_of(Unique(0, 2))
    others = others_of(loader)
    assert "a copy of BatchSampler of Unique fails" in (others.why_unknown(1, 0) or "")


def test_generators_of_other_ranks_must_be_the_same() -> None:
    def why(seed: int | None, agrees: bool | None) -> str | None:
        return others_of(loader_of(by_weight(seed)), lambda rank: agrees).why_unknown(1, 0)

    # As long as nothing is known of the others, generators of its own are taken to be the same.
    assert why(3, None) is None
    assert why(3, True) is None
    assert "another rank's is in another state" in (why(3, False) or "")
    assert "another rank's may be in another state" in (why(None, None) or "")
    assert why(None, True) is None


def test_there_are_no_batches_before_the_epoch() -> None:
    loader = loader_of(DistributedSampler(range(30), 2, 0))
    others = RankBatches(loader, EpochOrder(loader), 0, 2)
    assert others.why_unknown(1, 0) is None
    with pytest.raises(ValueError, match="the epoch has not begun"):
        others.batches(1, [0])
    with pytest.raises(ValueError, match="Endless has no indices"):
        RankBatches(DataLoader(Endless()), None, 0, 2).batches(1, [0])


def test_an_order_of_global_generators_is_derived_where_they_are_known_to_be_the_same() -> None:
    torch.manual_seed(8)
    wrapper = DistributedSamplerWrapper(RandomSampler(range(30)), num_replicas=2, rank=1, shuffle=False)
    served = list(loader_of(wrapper))
    torch.manual_seed(8)
    own = loader_of(DistributedSamplerWrapper(RandomSampler(range(30)), num_replicas=2, rank=0, shuffle=False))
    others = others_of(own, lambda rank: True)
    torch.rand(3)
    before = random_generators()
    assert_same(others.batches(1, range(8)), served)
    assert_same(random_generators(), before)
