"""What the engine of continuation requires of a front door."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel


class Training(Protocol):
    """A training that survives the death of workers, as the engine sees it."""

    # -- its process group ---------------------------------------------------------------------------------------

    def group_options(self) -> dict[str, Any]:
        """Return the arguments of ``torch.distributed.init_process_group``, the same for every generation."""

    @property
    def timeout(self) -> float:
        """The seconds after which a blocked collective fails."""

    def wrap(self) -> None:
        """Wrap the model for the current generation, whose members hold the same weights."""

    def unwrap(self) -> None:
        """Remove the wrapper, so that the model works without a group."""

    def wrappers(self) -> list[DistributedDataParallel]:
        """Return the present wrappers of the model; none without a group."""

    # -- its state -----------------------------------------------------------------------------------------------

    @property
    def module(self) -> Module:
        """The model, without wrappers."""

    def state(self) -> Any:
        """Return what a member that is behind this one needs: nested values and tensors."""

    def load_state(self, state: Any) -> None:
        """Bring this process, a replacement, to another member's :meth:`state`."""

    def load_weights(self, state: Any) -> None:
        """Load only what an optimizer step changes from another member's :meth:`state`."""

    def changes(self) -> int:
        """Return a number that grows with every change of parameters or of the optimizers' state."""

    @property
    def counted_steps(self) -> int | None:
        """The number of completed steps as the loops count them; ``None`` if they need not agree."""

    # -- its steps -----------------------------------------------------------------------------------------------

    @property
    def accumulates(self) -> bool:
        """Whether a step may start with gradients of earlier micro-batches."""

    @property
    def is_first(self) -> bool:
        """Whether this is the first training of the program, and so the one that a replacement reaches."""

    @property
    def can_admit(self) -> bool:
        """Whether a replacement can join now; otherwise all workers are restarted."""

    def leaves_training_next(self) -> bool:
        """Return whether something other than a step follows this one, which requires the complete group."""

    def stop(self) -> None:
        """Stop the job after the completed step."""

    # -- extra batches -------------------------------------------------------------------------------------------

    def extra_batches(self) -> Iterator[Any] | None:
        """Return endless batches of the training data in this process's own order; ``None`` if not supported."""

    def compute_gradient(self, batch: Any, ago: int = 0) -> Any:
        """Compute the gradient of a batch; discard the gradients before it. Return the loss.

        Args:
            batch: The batch.
            ago: How many batches before the present one it is.

        """

    def samples(self, batch: Any) -> int:
        """Return the number of samples in a batch."""

    @property
    def micro_batches(self) -> int:
        """The number of batches in a step."""

    # -- batches of missing workers ------------------------------------------------------------------------------

    def why_unknown(self, slot: int) -> str | None:
        """Return why the batches of missing workers are unknown; ``None`` if they are not, or before the first step.

        Args:
            slot: That of the first one whose batches will be asked for.

        """

    def batches_of(self, slot: int) -> list[Any]:
        """Return the batches of the worker in a slot in the present step, as a training step gets them."""

    def release_batches(self) -> None:
        """Stop loading batches of missing workers."""

    @property
    def batches_in_step(self) -> int:
        """The number of batches of each worker in the present step, up to the present one."""

    def covering(self, share: float) -> AbstractContextManager[None]:
        """Return a context to compute a batch of a missing worker.

        Args:
            share: The share of a whole batch that is computed; with 0, what is logged is discarded.

        """

    def counting_covered(self, scale: float) -> AbstractContextManager[None]:
        """Return a context for this worker's own batch, in which what was logged in :meth:`covering` counts, too.

        Args:
            scale: The share of workers that are present.

        """

    def keep_logs(self) -> Callable[[], object]:
        """Return what undoes all that the front door logs from now on, because the batch will be computed again."""

    # -- logging and restarts ------------------------------------------------------------------------------------

    def log(self, metrics: dict[str, float]) -> None:
        """Log metrics."""

    def prepare_restart(self, is_whole: bool) -> None:
        """Save what only this worker holds, unless its state is not whole: all workers will be restarted."""

    def own_state(self) -> dict[str, Any]:
        """Return what differs from worker to worker in the exact state, for the restart of this one."""

    def save_restart_state(self, more: dict[str, Any]) -> None:
        """Write the exact state, with ``more``, for the restart."""

    def release(self) -> None:
        """Finish all background work, because this process ends."""
