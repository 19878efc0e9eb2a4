"""The framework of a loop: plain PyTorch or Lightning Fabric. Accelerate, which knows more, has its own module."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning_scar.core.ranks import Ranks
from lightning_scar.core.training_state import TrainingState
from lightning_scar.core.zero import is_sharded


class Framework:
    """Plain PyTorch and Lightning Fabric: the user names what to save.

    Args:
        state: By name, as for :class:`~lightning_scar.loops.loop.SCARLoop`.

    Attributes:
        remedy: What to do if a model or an optimizer is missing, for an error message.

    """

    remedy = "put it into `state`"

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = TrainingState.of(state)

    def training_state(self) -> TrainingState:
        """Return the models, optimizers and other parts of the training."""
        return self._state

    # -- its data ------------------------------------------------------------------------------------------------

    def torch_loader(self, loader: Any) -> Any:
        """Return the loader of torch inside a loader of the framework."""
        return getattr(loader, "_dataloader", loader)

    def set_epoch(self, loader: Any, epoch: int) -> None:
        """Tell a loader, or its samplers, which epoch it is about to begin."""
        if hasattr(loader, "_num_iter_calls"):
            # Fabric counts from 0 in each process.
            loader._num_iter_calls = epoch
        inner = self.torch_loader(loader)
        for name in ("sampler", "batch_sampler"):
            set_epoch = getattr(getattr(inner, name, None), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)

    def shuffle_seed(self, loader: Any) -> int | None:
        """Return the seed of a loader's order, which is combined with the epoch; ``None`` if it has none."""
        return None

    def set_shuffle_seed(self, loader: Any, seed: int) -> None:
        """Set the seed that :meth:`shuffle_seed` returns."""

    def is_over(self, loader: Any) -> bool:
        """Return whether a loader is known to have served its last batch."""
        return False

    def loader_state(self, loader: Any) -> Any:
        """Return the state of a loader that has one, behind the present batch; else ``None``."""
        inner = self.torch_loader(loader)
        return inner.state_dict() if hasattr(inner, "state_dict") else None

    def load_loader_state(self, loader: Any, state: Any) -> None:
        """Load a :meth:`loader_state`."""
        self.torch_loader(loader).load_state_dict(state)

    def whole_sampler(self, batch_sampler: Any) -> tuple[Any, Any]:
        """Return the batch sampler of the whole dataset inside one rank's, and the batch size of one rank."""
        return batch_sampler, getattr(batch_sampler, "batch_size", None)

    def batches_per_fetch(self, loader: Any) -> int:
        """Return how many batches of its sampler a loader of this process takes for one batch."""
        return 1

    def batches_ahead(self, loader: Any) -> int:
        """Return how many batches of its sampler a loader takes before they are needed."""
        return 0

    def given(self, loader: Any, batch: Any) -> Any:
        """Return a batch as a loader gives it to the loop: on its device."""
        if not hasattr(loader, "_dataloader"):
            return batch
        alike = copy.copy(loader)
        alike._dataloader = [batch]
        return next(iter(alike))

    def share(self, loader: Any, ranks: Ranks) -> tuple[int, int]:
        """Return the number of this rank's share of the data, and the number of shares."""
        return ranks.rank, ranks.world_size

    # -- accumulation --------------------------------------------------------------------------------------------

    def record_batch(self) -> None:
        """Record how many batches are accumulated."""

    def accumulated(self) -> dict[str, Any]:
        """Return what :meth:`record_batch` has recorded, as values of a checkpoint dict."""
        return {}

    def restore_accumulated(self, position: Mapping[str, Any]) -> None:
        """Restore what :meth:`accumulated` returned."""

    # -- a step --------------------------------------------------------------------------------------------------

    @property
    def synchronizes(self) -> bool:
        """Whether the current batch ends a step; otherwise its gradients are accumulated."""
        return True

    @property
    def micro_batches(self) -> int:
        """The number of batches in a step."""
        return 1

    def update(self) -> None:
        """Step all optimizers and schedulers, and zero the gradients."""
        state = self.training_state()
        for each in (*state.optimizers, *state.schedulers):
            each.step()
        for optimizer in state.optimizers:
            optimizer.zero_grad()

    # -- continuation --------------------------------------------------------------------------------------------

    def check_continuation(self) -> None:
        """Check that the training can continue when a worker dies.

        Raises:
            ValueError: If not; the message says what to do.

        """
        if any(is_sharded(optimizer) for optimizer in self.training_state().inner_optimizers):
            raise ValueError(
                "SCARContinuation does not support ZeroRedundancyOptimizer, because the shard of a dead worker would "
                "be lost. Use another optimizer, or omit the continuation."
            )

    def check_beginning(self) -> None:
        """Check that nothing was set up too early for a continuation.

        Raises:
            ValueError: If so; the message says what to do.

        """

    def set_up_joiner(self, slot: int, size: int) -> None:
        """Set up this process as a replacement, which is still in a group of its own."""

    def on_join(self) -> None:
        """Prevent collectives until the first step: this replacement has just received the state."""

    def before_step(self) -> None:
        """Undo :meth:`on_join` before a step."""

    def regroup(self, rank: int, size: int, local_rank: int) -> None:
        """Tell the framework that the process group has changed; with a size of 1 there may be none.

        Args:
            rank: The rank of this process.
            size: The number of processes.
            local_rank: The rank of this process on its node.

        """

    def counting_all(self, size: int) -> AbstractContextManager[Any]:
        """Return a context for an update, in which schedulers advance as with ``size`` processes."""
        return nullcontext()

    def accumulating(self) -> AbstractContextManager[Any]:
        """Return a context for a batch after which no step follows."""
        return nullcontext()

    def undivided(self) -> AbstractContextManager[Any]:
        """Return a context for a gradient, in which the loss is not divided for accumulation."""
        return nullcontext()

    def extra_batches(self, loader: Any, seed: int) -> Iterator[Any] | None:
        """Return batches of the training data in this process's own order; ``None`` if not supported.

        Args:
            loader: The loader of the present epoch; ``None`` before the first one.
            seed: The seed of the order.

        """
        return None
