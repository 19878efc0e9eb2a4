"""A rank knows the batches of every other rank, and knowing them changes nothing of its own."""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

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
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from lightning_scar.core.data_order import EpochOrder
from lightning_scar.core.random_generators import random_generators
from lightning_scar.core.rank_batches import RankBatches

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
    for sampler in (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)):
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
    assert others.why_unknown() is None
    asked = data.draw(st.lists(st.integers(0, len(present)), max_size=4), label="asked")
    for position in (done - 1, done - 1, done, *asked):
        for other in range(size):
            expected = dict(enumerate(served[other][-1])).get(position)
            assert_same(others.batches(other, [position]), [expected])
    assert_same(random_generators(), before)
    seen += iterator
    assert_same(seen, present)
    # And the epoch behind.
    set_epoch(loader, how["epoch"] + 1)
    again = make(rank, size, samples, how)
    assert_same(list(loader), [*epochs(again, 0, how["epoch"] + 2)][-1])
