"""The rest of an interrupted epoch, shared out among another number of ranks.

Ranks divide one order of the whole dataset. It can be drawn again if its sampler is one of torch's own; then the rest
of it can be divided anew, and each sample is served once.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler


def recipe(batch_sampler: Any) -> dict[str, Any] | None:
    """Return what the order of the whole dataset can be drawn again from; ``None`` if that is not known.

    Args:
        batch_sampler: A batch sampler of one rank.

    Returns:
        Plain values; with the state of an :class:`~lightning_scar.core.data_order.EpochOrder` they suffice.

    Example::

        >>> recipe(BatchSampler(SequentialSampler(range(10)), batch_size=2, drop_last=False))
        {'length': 10, 'batch_size': 2}

    """
    if type(batch_sampler) is not BatchSampler:
        return None
    sampler, batch_size = batch_sampler.sampler, batch_sampler.batch_size
    if type(sampler) is SequentialSampler:
        return {"length": len(sampler), "batch_size": batch_size}
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return {"length": len(sampler), "batch_size": batch_size, "random": True}
    if type(sampler) is DistributedSampler:
        options = {"shuffle": sampler.shuffle, "seed": sampler.seed, "epoch": sampler.epoch}
        return {"length": len(sampler.dataset), "batch_size": batch_size, **options}  # type: ignore[arg-type]
    return None


def whole_epoch(known: Mapping[str, Any], state: Mapping[str, Any]) -> list[int]:
    """Return the indices of a dataset in the order of an epoch.

    Args:
        known: The :func:`recipe`.
        state: The state of the epoch's order.

    """
    length = range(known["length"])
    if known.get("random"):
        from lightning_scar.core.data_order import EpochOrder

        began = state["began"]
        own = next((value for key, value in began.items() if isinstance(key, int)), None)
        generator = torch.Generator() if own is not None else None
        order = EpochOrder(DataLoader(length, batch_size=None, sampler=RandomSampler(length, generator=generator)))
        order.begin_at({"began": {**began, 0: own} if own is not None else began, "now": {}}, done=0)
        return list(order)
    sampler = DistributedSampler(
        length, num_replicas=1, rank=0, shuffle=known.get("shuffle", False), seed=known.get("seed", 0)
    )
    sampler.set_epoch(known.get("epoch", 0))
    return list(sampler)


def share(rest: list[int], rank: int, ranks: int, batch_size: int, drop_last: bool) -> list[list[int]]:
    """Return the batches of one rank, when all of them share out a list of indices as ``DistributedSampler`` does.

    Args:
        rest: The indices.
        rank: The rank.
        ranks: The number of ranks.
        batch_size: Samples in a batch of one rank.
        drop_last: Whether to leave out what does not suffice for all ranks, instead of repeating some indices.

    Example::

        >>> share([5, 3, 4, 0, 1], rank=1, ranks=2, batch_size=2, drop_last=False)
        [[3, 0], [5]]

    """
    missing = -len(rest) % ranks
    rest = rest[: len(rest) // ranks * ranks] if drop_last else rest + (rest * ranks)[:missing]
    return list(BatchSampler(rest[rank::ranks], batch_size, drop_last))
