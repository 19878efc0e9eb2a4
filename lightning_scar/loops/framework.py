"""What a loop is written with: plain PyTorch or Lightning Fabric; Accelerate, which knows more, has its own module."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning_scar.core.training_state import TrainingState
from lightning_scar.core.zero import is_sharded


class Framework:
    """Plain PyTorch and Lightning Fabric: the user tells what there is.

    Args:
        state: By name, as for :class:`~lightning_scar.loops.loop.SCARLoop`.

    Attributes:
        remedy: What to do if a model or an optimizer is missing.

    """

    remedy = "put it into `state`"

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = TrainingState.of(state)

    def training_state(self) -> TrainingState:
        """What the training consists of."""
        return self._state

    # -- its data ------------------------------------------------------------------------------------------------

    def look_at_batch(self) -> None:
        """A batch is over, or its step; its loader is still the active one."""

    def place(self) -> dict[str, Any]:
        """What else than the number of batches tells where the loop was when it looked at a batch last."""
        return {}

    def take_place(self, batches: int, place: Mapping[str, Any], before: int, now: int) -> int:
        """Goes on at another's place.

        Args:
            batches: How many each of its ranks had done.
            place: Its :meth:`place`.
            before: How many ranks it had.
            now: How many there are.

        Returns:
            How many batches that is for each of the present ranks.

        """
        return batches * before // now

    # -- a step --------------------------------------------------------------------------------------------------

    @property
    def synchronizes(self) -> bool:
        """Whether the present batch ends a step, or else its gradients are added up for a later one."""
        return True

    @property
    def micro_batches(self) -> int:
        """How many batches make a step."""
        return 1

    def update(self) -> None:
        """Steps everything, and sets gradients to zero."""
        state = self.training_state()
        for each in (*state.optimizers, *state.schedulers):
            each.step()
        for optimizer in state.optimizers:
            optimizer.zero_grad()

    # -- continuation --------------------------------------------------------------------------------------------

    def check_continuation(self) -> None:
        """Refuses what cannot be continued when a worker dies.

        Raises:
            ValueError: With a remedy.

        """
        if any(is_sharded(optimizer) for optimizer in self.training_state().inner_optimizers):
            raise ValueError(
                "SCARContinuation does not support a ZeroRedundancyOptimizer: what a dead worker alone held of its "
                "state would be lost. Use another optimizer, or leave the continuation out."
            )

    def check_beginning(self) -> None:
        """Refuses what was set up too early for a continuation, on every worker.

        Raises:
            ValueError: With a remedy.

        """

    def set_up_joiner(self, slot: int, size: int) -> None:
        """This process takes the place of a worker that died; it is still in a group of its own."""

    def joins(self) -> None:
        """It has the state of the others; nothing may run a collective until its first step."""

    def has_joined(self) -> None:
        """Its first step begins."""

    def regroup(self, rank: int, size: int, local_rank: int) -> None:
        """The process group is another one, or, with a size of 1, there may be none.

        Args:
            rank: This process's number in it.
            size: How many processes it has.
            local_rank: This process's number among those of its node.

        """

    def counting_all(self, size: int) -> AbstractContextManager[Any]:
        """While an update is made: schedules advance as if nobody was missing of so many."""
        return nullcontext()

    def undivided(self) -> AbstractContextManager[Any]:
        """While the gradient is computed of a batch that is the only one of its step."""
        return nullcontext()

    def extra_batches(self, seed: int) -> Iterator[Any] | None:
        """Batches of the training data in an order of this process's own; ``None`` if there are none."""
        return None
