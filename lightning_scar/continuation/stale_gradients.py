"""The gradients that a survivor collects while the weights stay unchanged."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, RandomSampler

from lightning_scar.continuation.outages import OutagePolicy
from lightning_scar.continuation.protocol import Training
from lightning_scar.core.gradient_buffer import StaleGradientBuffer

Closure = Callable[[], Any]


class StaleGradients:
    """Gradients of the interrupted step's batch and of extra batches, which come from a separate iterator.

    The loop's own iterator must not advance, or the ranks would end their epoch at different batches.

    Args:
        training: The training.
        policy: How many gradients to collect, and how to apply them.
        batch: The batch of the interrupted step.

    """

    def __init__(self, training: Training, policy: OutagePolicy, batch: Any) -> None:
        batches = training.extra_batches()
        assert batches is not None
        self._training = training
        self._batch = batch
        self._loss: Any = None
        #: The number of optimizer steps that :meth:`flush` has made.
        self.applied = 0
        self._batches = batches
        parameters = [p for p in training.module.parameters() if p.requires_grad]
        self._buffer = StaleGradientBuffer(parameters, mode=policy.flush, max_staleness=policy.max_staleness)

    @property
    def is_full(self) -> bool:
        """Whether the limit of the policy is reached."""
        return self._buffer.is_full

    @property
    def extra(self) -> int:
        """The number of gradients beyond that of the interrupted step."""
        return max(self._buffer.contributions - 1, 0)

    def collect(self, closure: Closure, until: Callable[[], bool]) -> None:
        """Collect gradients until the limit is reached, or a condition holds.

        Args:
            closure: Computes the interrupted step's gradient.
            until: The condition.

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
        """Apply the gradients that all members have collected.

        Args:
            attempt: Makes an optimizer step, given a function that returns the loss.

        Returns:
            What the last step returned.

        """
        output = None
        for _ in self._buffer.steps(dist.group.WORLD):
            output = attempt(lambda: self._loss)
            self.applied += 1
        return output


def reshuffled(loader: "DataLoader[Any]", seed: int, batch_size: int | None = None) -> Iterator[Any]:
    """Return endless batches of a loader's data set, shuffled by a separate seed.

    Args:
        loader: The loader.
        seed: The seed of the order.
        batch_size: The batch size, if ``loader.batch_size`` does not tell.

    """
    own = DataLoader(
        loader.dataset,
        batch_size=batch_size or loader.batch_size,
        sampler=RandomSampler(loader.dataset, generator=torch.Generator().manual_seed(seed)),  # type: ignore[arg-type]
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
    )
    return itertools.chain.from_iterable(itertools.repeat(own))
