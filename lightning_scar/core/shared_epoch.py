"""The rest of an interrupted epoch, shared out among another number of ranks.

Ranks divide one order of the whole dataset. If its sampler is one of torch's own, that order can be drawn again, and
what is left of it can be divided anew, so that each sample is served once.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lightning_scar.core.data_order import EpochOrder, Share


def recipe(batch_sampler: Any) -> dict[str, Any] | None:
    """Return what the order of the whole dataset can be drawn again from.

    Args:
        batch_sampler: A batch sampler of one rank.

    Returns:
        Plain values, which suffice with the state of the loader's
        :class:`~lightning_scar.core.data_order.EpochOrder`; ``None`` if the order is not known.

    Example::

        >>> recipe(BatchSampler(SequentialSampler(range(10)), batch_size=2, drop_last=False))
        {'length': 10, 'batch_size': 2}

    """
    # By its name, because torchdata has a class of its own for the same batches.
    if not isinstance(batch_sampler, BatchSampler) or type(batch_sampler).__name__ != "BatchSampler":
        return None
    sampler: Any = batch_sampler.sampler
    batch_size = batch_sampler.batch_size
    if type(sampler) is SequentialSampler:
        return {"length": len(sampler), "batch_size": batch_size}
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return {"length": len(sampler), "batch_size": batch_size, "random": True}
    if isinstance(sampler, RandomSampler) and {"initial_seed", "epoch"} <= vars(sampler).keys():
        # Accelerate's: it seeds its generator anew in every epoch.
        return {
            "length": len(sampler),
            "batch_size": batch_size,
            "random": vars(sampler)["initial_seed"] + vars(sampler)["epoch"],
        }
    if type(sampler) is DistributedSampler:
        options = {"shuffle": sampler.shuffle, "seed": sampler.seed, "epoch": sampler.epoch}
        return {"length": len(sampler.dataset), "batch_size": batch_size, **options}  # type: ignore[arg-type]
    return None


def not_shared_out(before: int, now: int) -> str:
    """Return what to say if the rest of an epoch cannot be shared out.

    Args:
        before: The number of ranks that saved it.
        now: The number of present ranks.

    """
    return (
        f"lightning-scar: this run was saved by {before} ranks and is resumed by {now}, which divide the data in an "
        "order of their own: in this epoch, some samples will be repeated and others skipped. Resume on "
        f"{before} ranks to avoid it."
    )


class RestOfEpoch:
    """What is not done of an epoch that several ranks have begun.

    Args:
        known: The :func:`recipe` of the epoch.
        began: The states of the random generators when it began.
        done: The number of samples that are done.

    """

    def __init__(self, known: Mapping[str, Any], began: Mapping[Any, Any], done: int) -> None:
        self._known = dict(known)
        self._began = dict(began)
        self._done = done

    @classmethod
    def of(cls, state: Mapping[str, Any], done: int, ranks: int, batch_sampler: Any) -> "RestOfEpoch | None":
        """Return the rest of a saved epoch; ``None`` if its order, or that of the present one, is not known.

        Args:
            state: The saved state of the order, with its ``"recipe"``; and ``"shared"``, the :meth:`state` of the rest
                that its ranks had shared out, with the number of batches ``"at"`` that time.
            done: The number of batches that each rank had done.
            ranks: The number of ranks.
            batch_sampler: The present batch sampler of the whole dataset, or of one rank.

        """
        known = state.get("recipe")
        if known is None or recipe(batch_sampler) is None:
            return None
        shared = state.get("shared") or {"recipe": known, "began": state["began"], "done": 0, "at": 0}
        samples = shared["done"] + (done - shared["at"]) * ranks * known["batch_size"]
        return cls(shared["recipe"], shared["began"], samples)

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "RestOfEpoch":
        """Return the rest that :meth:`state` was called of."""
        return cls(state["recipe"], state["began"], state["done"])

    def state(self) -> dict[str, Any]:
        """Return what :meth:`of` needs to share the rest of this rest out."""
        return {"recipe": self._known, "began": self._began, "done": self._done}

    def share(self, ranks: int, batch_size: int, drop_last: bool) -> Share:
        """Return what gives the batches of a rank: the samples are divided as ``DistributedSampler`` divides an epoch.

        Args:
            ranks: The number of ranks.
            batch_size: Samples in a batch of one rank.
            drop_last: Whether to leave out what does not suffice for all ranks, instead of repeating some samples.

        Example::

            >>> sampler = BatchSampler(SequentialSampler(range(10)), batch_size=2, drop_last=False)
            >>> share = RestOfEpoch(recipe(sampler), {}, done=5).share(2, 2, drop_last=False)
            >>> share(0), share(1)
            ([[5, 7], [9]], [[6, 8], [5]])

        """
        samples = self._samples()
        surplus = len(samples) % ranks
        if surplus and drop_last:
            samples = samples[:-surplus]
        elif surplus:
            samples += (samples * ranks)[: ranks - surplus]
        return partial(_batches, samples, ranks, batch_size, drop_last)

    def _samples(self) -> list[int]:
        known, dataset = self._known, range(self._known["length"])
        seed = known.get("random", False)
        if seed is False:
            shuffle, seed = known.get("shuffle", False), known.get("seed", 0)
            whole: DistributedSampler[int] = DistributedSampler(dataset, 1, 0, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
            whole.set_epoch(known.get("epoch", 0))
            return list(whole)[self._done :]
        own = next((state for key, state in self._began.items() if isinstance(key, int)), None)
        generator = torch.Generator() if own is not None or seed is not True else None
        if generator is not None and seed is not True:
            own = generator.manual_seed(seed).get_state()
        # Without a batch size, its items are the indices themselves.
        sampler = RandomSampler(dataset, generator=generator)
        order = EpochOrder(DataLoader(dataset, batch_size=None, sampler=sampler))  # type: ignore[arg-type]
        order.begin_at({"began": self._began if own is None else {0: own}, "now": {}}, done=0)
        return list(order)[self._done :]


def _batches(samples: list[int], ranks: int, batch_size: int, drop_last: bool, rank: int) -> list[list[int]]:
    return list(BatchSampler(samples[rank::ranks], batch_size, drop_last))
