"""What a front door does for the engine."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch.nn import Module


class Training(Protocol):
    """A training that is to outlive its workers, as the engine sees it."""

    # -- its process group ---------------------------------------------------------------------------------------

    def group_options(self) -> dict[str, Any]:
        """How the process group of any generation is made, for ``torch.distributed.init_process_group``."""

    @property
    def timeout(self) -> float:
        """For how many seconds a worker is blocked in a collective before it gives up."""

    def wrap(self) -> None:
        """Makes the model compute with the present generation, whose members hold the same weights."""

    def unwrap(self) -> None:
        """Makes the model compute alone."""

    # -- its state -----------------------------------------------------------------------------------------------

    @property
    def module(self) -> Module:
        """The model, without wrappers."""

    def state(self) -> Any:
        """What a member needs that is behind this one: nested values and tensors."""

    def take_state(self, state: Any) -> None:
        """Puts this process, a replacement, where the one was that the :meth:`state` comes from."""

    def take_weights(self, state: Any) -> None:
        """Takes of another's :meth:`state` what an optimizer step changes, and nothing else."""

    # -- its steps -----------------------------------------------------------------------------------------------

    @property
    def accumulates(self) -> bool:
        """Whether gradients of earlier micro-batches may wait to be added to."""

    @property
    def is_first(self) -> bool:
        """Whether a replacement, which runs the program from its beginning, would come to this training first."""

    @property
    def can_take_in(self) -> bool:
        """Whether it could be taken in, or else all workers must be started again."""

    def leaves_training_next(self) -> bool:
        """Whether, behind a step, something else than the next one follows, for which all must be there."""

    def stop(self) -> None:
        """The job is to end behind the step that is done."""

    # -- extra batches -------------------------------------------------------------------------------------------

    def extra_batches(self) -> Iterator[Any] | None:
        """Batches of the training data, in an order of this process's own, without end; ``None`` if there are none."""

    def compute_gradient(self, batch: Any) -> None:
        """Computes the gradient of a batch in place of the gradients that there are."""

    def samples(self, batch: Any) -> int:
        """The number of samples in a batch."""

    @property
    def micro_batches(self) -> int:
        """How many batches make a step."""

    # -- what is told, and left behind ---------------------------------------------------------------------------

    def log(self, metrics: dict[str, float]) -> None:
        """Gives metrics to whoever logs."""

    def prepare_restart(self) -> None:
        """All workers will be started again: what this one alone holds must not be lost."""

    def keep(self, more: dict[str, Any]) -> None:
        """Writes the exact state, with ``more``, for that start."""

    def release(self) -> None:
        """Finishes what is under way in the background: this process ends."""
