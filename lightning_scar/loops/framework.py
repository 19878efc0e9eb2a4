"""The framework of a loop: plain PyTorch or Lightning Fabric. Accelerate, which knows more, has its own module."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

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

    def record_batch(self) -> None:
        """Record the data position after a batch or its step, while its loader is active."""

    def data_position(self) -> dict[str, Any]:
        """Return what else than the number of batches is known about the recorded position."""
        return {}

    def restore_data_position(self, batches: int, position: Mapping[str, Any], before: int, now: int) -> int:
        """Continue at a position that was saved, perhaps by another number of ranks.

        Args:
            batches: The number of batches that each of those ranks had done.
            position: Their :meth:`data_position`.
            before: The number of those ranks.
            now: The number of present ranks.

        Returns:
            The number of batches that this is for each of the present ranks.

        """
        return batches * before // now

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

    def undivided(self) -> AbstractContextManager[Any]:
        """Return a context for a gradient, in which the loss is not divided for accumulation."""
        return nullcontext()

    def extra_batches(self, seed: int) -> Iterator[Any] | None:
        """Return batches of the training data in this process's own order; ``None`` if not supported."""
        return None
