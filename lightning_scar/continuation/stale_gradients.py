"""The gradients that a survivor collects while weights wait."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, RandomSampler

from lightning_scar.continuation.outages import OutagePolicy
from lightning_scar.continuation.protocol import Training
from lightning_scar.core.gradient_buffer import StaleGradientBuffer

Closure = Callable[[], Any]


class Collection:
    """Gradients of the interrupted step's batch and of extra batches, from an iterator of their own.

    The loops' own iterator must not move: ranks would end their epoch at different batches.

    Args:
        training: Whose model and data.
        policy: How many to collect, and how to apply them.
        batch: The interrupted step's.

    """

    def __init__(self, training: Training, policy: OutagePolicy, batch: Any) -> None:
        batches = training.extra_batches()
        assert batches is not None
        self._training = training
        self._batch = batch
        self._loss: Any = None
        #: How many optimizer steps :meth:`flush` has made.
        self.applied = 0
        self._batches = batches
        parameters = [p for p in training.module.parameters() if p.requires_grad]
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
        training = self._training
        if self._loss is None:
            self._loss = closure()
            self._buffer.add(training.micro_batches * training.samples(self._batch))
        while not (self.is_full or until()):
            batch = next(self._batches)
            training.compute_gradient(batch)
            self._buffer.add(training.samples(batch))

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


def shuffled_anew(loader: "DataLoader[Any]", seed: int, batch_size: int | None = None) -> Iterator[Any]:
    """Batches of a loader's data set in an order of one's own, without end.

    Args:
        loader: Whose.
        seed: Of the order.
        batch_size: Its batch size, where it is not the loader's attribute of this name.

    """
    own = DataLoader(
        loader.dataset,
        batch_size=batch_size or loader.batch_size,
        sampler=RandomSampler(loader.dataset, generator=torch.Generator().manual_seed(seed)),  # type: ignore[arg-type]
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
    )
    return itertools.chain.from_iterable(itertools.repeat(own))


def feasible(policy: OutagePolicy, training: Training, says_so: bool) -> OutagePolicy:
    """The policy, or another one where it is out of the question.

    Args:
        policy: What was asked for.
        training: Its data have been set up.
        says_so: Whether this process warns of it.

    """
    if policy.on_failure != "buffer" or training.extra_batches() is not None:
        return policy
    if says_so:
        warnings.warn(
            "lightning-scar: on_failure='buffer' draws extra batches, and so it needs a map-style data set in one "
            "DataLoader with a batch size; the group shrinks instead after a failure.",
            stacklevel=2,
        )
    return replace(policy, on_failure="shrink")
