"""The gradients that a survivor collects while weights wait."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from lightning_scar import joining
from lightning_scar.core.gradient_buffer import StaleGradientBuffer
from lightning_scar.outage import OutagePolicy

Closure = Callable[[], Any]


class Collection:
    """Gradients of the interrupted step's batch and of extra batches, from an iterator of their own.

    The loops' own iterator must not move: ranks would end their epoch at different batches.

    Args:
        trainer: Whose model and data.
        policy: How many to collect, and how to apply them.
        batch: The interrupted step's.

    """

    def __init__(self, trainer: pl.Trainer, policy: OutagePolicy, batch: Any) -> None:
        self._trainer = trainer
        self._batch = batch
        self._loss: Any = None
        #: How many optimizer steps :meth:`flush` has made.
        self.applied = 0
        self._batches = extra_batches(trainer)
        parameters = [p for p in trainer.lightning_module.parameters() if p.requires_grad]
        self._buffer = StaleGradientBuffer(parameters, mode=policy.flush, max_staleness=policy.max_staleness)

    @property
    def is_full(self) -> bool:
        """Whether no more may be collected."""
        return self._buffer.is_full

    @property
    def stale(self) -> int:
        """How many there are beyond that of the interrupted step."""
        return max(self._buffer.contributions - 1, 0)

    def run(self, closure: Closure, until: Callable[[], bool]) -> None:
        """Collects until there is no room for more, or something else is to be done.

        Args:
            closure: Computes the interrupted step's gradient.
            until: Says so.

        """
        trainer = self._trainer
        if self._loss is None:
            self._loss = closure()
            micro_batches = trainer.accumulate_grad_batches
            self._buffer.add(micro_batches * joining.batch_size(trainer, self._batch))
        while not (self.is_full or until()):
            batch = next(self._batches)
            joining.compute_gradient(trainer, batch)
            self._buffer.add(joining.batch_size(trainer, batch))

    def flush(self, attempt: Callable[[Closure], Any]) -> Any:
        """Applies what all members have collected.

        Args:
            attempt: Makes an optimizer step, given what returns the loss.

        Returns:
            What the last step returned.

        """
        output = None
        for _ in self._buffer.steps(dist.group.WORLD):
            output = attempt(lambda: self._loss)
            self.applied += 1
        return output


def extra_batches(trainer: pl.Trainer) -> Iterator[Any]:
    """Batches of the training data in an order of this rank's own, without end."""
    loader = _only_loader(trainer)
    assert loader is not None
    generator = torch.Generator().manual_seed(trainer.global_step * trainer.world_size + trainer.global_rank)
    own = DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=RandomSampler(loader.dataset, generator=generator),  # type: ignore[arg-type]
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
    )
    return itertools.chain.from_iterable(itertools.repeat(own))


def feasible(policy: OutagePolicy, trainer: pl.Trainer) -> OutagePolicy:
    """The policy, or another one where it is out of the question; says so.

    Args:
        policy: What was asked for.
        trainer: Its data have been set up.

    """
    if policy.on_failure != "buffer" or can_draw(trainer):
        return policy
    rank_zero_warn(
        "lightning-scar: on_failure='buffer' draws extra batches, and so it needs a map-style data set in one "
        "DataLoader with a batch size; the group shrinks instead after a failure."
    )
    return replace(policy, on_failure="shrink")


def can_draw(trainer: pl.Trainer) -> bool:
    """Whether the training data are such that extra batches can be drawn from them."""
    loader = _only_loader(trainer)
    return loader is not None and loader.batch_size is not None and not isinstance(loader.dataset, IterableDataset)


def _only_loader(trainer: pl.Trainer) -> "DataLoader[Any] | None":
    loader = trainer.train_dataloader
    return loader if isinstance(loader, DataLoader) else None
