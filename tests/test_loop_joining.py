"""A replacement of a loop takes the place that its state tells, with any loader, and knows the batches of others."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from helpers import samples
from torch.utils.data import DataLoader, DistributedSampler, Subset, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_scar.core.ranks import Ranks
from lightning_scar.loops.accelerate import WithAccelerate
from lightning_scar.loops.data import LoopData
from lightning_scar.loops.framework import Framework

#: Not a multiple of the ranks, nor of the batch sizes.
DATA = Subset(samples(16), range(61))
SIZE, EPOCHS = 2, 2
#: Makes a loader of a rank, with a batch size.
Make = Callable[[Ranks, int], Any]


def distributed(ranks: Ranks, batch_size: int, kind: Any = DataLoader, **options: Any) -> Any:
    sampler: Any = DistributedSampler(DATA, ranks.world_size, ranks.rank)
    return kind(DATA, batch_size=batch_size, sampler=sampler, **options)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def with_accelerate(ranks: Ranks, batch_size: int, kind: Any = DataLoader, **options: Any) -> Any:
    loader = kind(DATA, batch_size=batch_size, shuffle=True, generator=generator())
    return prepare_data_loader(loader, num_processes=ranks.world_size, process_index=ranks.rank, **options)


def weighted(ranks: Ranks, batch_size: int) -> Any:
    """Accelerate divides an order that a generator of the sampler's own gives."""
    sampler = WeightedRandomSampler(range(1, 62), 61, generator=generator())
    loader = DataLoader(DATA, batch_size=batch_size, sampler=sampler)
    return prepare_data_loader(loader, num_processes=ranks.world_size, process_index=ranks.rank)


LOADERS: dict[str, Make] = {
    "distributed": distributed,
    "stateful": lambda ranks, batch_size: distributed(ranks, batch_size, StatefulDataLoader),
    "a generator": lambda ranks, batch_size: distributed(ranks, batch_size, generator=generator()),
    "Accelerate": with_accelerate,
    "Accelerate, seedable": lambda ranks, batch_size: with_accelerate(ranks, batch_size, use_seedable_sampler=True),
    "Accelerate, stateful": lambda ranks, batch_size: with_accelerate(
        ranks, batch_size, StatefulDataLoader, use_stateful_dataloader=True, use_seedable_sampler=True
    ),
    "Accelerate, weighted": weighted,
}
#: How the run had begun: with how many ranks, which batch size, and after how many batches it went on with others.
BEFORE = {"a whole epoch": None, "fewer ranks": (1, 4, 3), "another batch size": (2, 6, 2)}


class Moment(NamedTuple):
    """What a rank has at a batch: its samples, those that it derives of the other rank, and the state behind it."""

    epoch: int
    batch: list[float]
    other: list[float] | None
    state: dict[str, Any]


def of_rank(ranks: Ranks, make: Make, batch_size: int, saved: dict[str, Any] | None, before: int) -> list[Moment]:
    """What a rank has until the end; it begins where another one was."""
    # Accelerate's seedable sampler takes its seed from here.
    torch.manual_seed(1)
    loader = make(ranks, batch_size)
    torch.manual_seed(ranks.rank)
    is_accelerates = hasattr(loader, "base_dataloader") or make is with_accelerate
    data = LoopData(WithAccelerate(Accelerator(cpu=True)) if is_accelerates else Framework({}))
    data.ranks = ranks
    if saved is not None:
        data.load(copy.deepcopy(saved), before)
    moments = []
    while data.epoch < EPOCHS:
        epoch = data.epoch
        for x, _ in data.batches(loader):
            other = None
            if ranks.world_size > 1:
                why = data.why_batches_unknown(1 - ranks.rank, data.position)
                assert why is None, why
                (batch,) = data.batches_of(1 - ranks.rank, [data.position])
                other = sums(batch[0]) if batch is not None else None
            data.count()
            moments.append(Moment(epoch, sums(x), other, copy.deepcopy(data.state())))
    data.close()
    return moments


def sums(x: torch.Tensor) -> list[float]:
    return x.sum(1).tolist()


#: The rest of the other orders is not shared out: torchdata's sampler may have another seed on each rank.
SHARED = [name for name in LOADERS if name not in ("Accelerate, stateful", "Accelerate, weighted")]
CELLS = [(name, before) for name in LOADERS for before in BEFORE if name in SHARED or not BEFORE[before]]


@pytest.mark.filterwarnings("error:.*repeated")
@pytest.mark.parametrize(("name", "before"), CELLS)
def test_a_replacement_takes_its_place(name: str, before: str) -> None:
    make, begun = LOADERS[name], BEFORE[before]
    saved, ranks_before = None, SIZE
    if begun is not None:
        ranks_before, batch_size, after = begun
        saved = of_rank(Ranks(0, ranks_before), make, batch_size, None, 1)[after - 1].state
    own, other = (of_rank(Ranks(rank, SIZE), make, 4, saved, ranks_before) for rank in range(SIZE))
    assert len(own) == len(other)
    assert [moment.other for moment in own] == [moment.batch for moment in other]
    for done in range(1, len(own)):
        # What a survivor hands over is of the other rank.
        joiner = of_rank(Ranks(0, SIZE), make, 4, other[done - 1].state, SIZE)
        assert [moment[:3] for moment in joiner] == [moment[:3] for moment in own[done:]], done
