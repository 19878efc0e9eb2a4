"""How a worker goes from one generation to the next: one group, one state."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch.distributed as dist

from lightning_scar import _lightning, joining
from lightning_scar.core.exchange import receive, send
from lightning_scar.elastic.membership import Member
from lightning_scar.outage import Outages

if TYPE_CHECKING:
    from lightning_scar.strategy import SCARDDPStrategy


class Generations:
    """The process groups that a worker is in, one after the other, and the state that it shares with their members.

    Args:
        strategy: Says how groups are made, and wraps the model.
        trainer: Whose state it is.
        member: This worker, as the supervisor knows it.
        outages: The history that members share.

    """

    def __init__(self, strategy: "SCARDDPStrategy", trainer: pl.Trainer, member: Member, outages: Outages) -> None:
        self._outages = outages
        self._strategy = strategy
        self._trainer = trainer
        self._member = member
        #: How many optimizer steps this worker has completed; -1 if it has no state of the training yet.
        self.steps = 0
        #: How many of the steps that stale gradients made it has completed since.
        self.substeps = 0
        #: Whether some member of the present generation entered it ``ready``.
        self.some_are_ready = False

    def enter_first(self) -> None:
        """Enters the generation that all workers start in."""
        self._member.enter_first(**self._strategy.group_options())

    def enter_next(
        self, boundary: bool, closure: Callable[[], Any] | None = None, waited: float = 0.0, ready: bool = False
    ) -> bool:
        """Leaves the present generation, and enters the next one that holds together.

        Args:
            boundary: Whether this worker stands behind a step, rather than in one.
            closure: The step's, for a worker that turns out to be behind.
            waited: Seconds for which this worker had been blocked when it gave up.
            ready: What the others learn of this worker, see :attr:`some_are_ready`.

        Returns:
            Whether this worker was behind the others. It has their state then, and stands behind its step.

        """
        was_behind = False
        while True:
            self.leave()
            try:
                self._enter(boundary or was_behind, waited)
                if self._level(closure, ready):
                    was_behind = True
                if dist.is_initialized():
                    self._strategy.wrap()
                    return was_behind
            except Exception as error:
                if not self._member.is_due_to_failure(error):
                    raise

    def leave(self) -> None:
        """Closes the group and makes the model compute alone."""
        self._strategy.unwrap()
        self._member.leave()

    def _enter(self, boundary: bool, waited: float) -> None:
        options = self._strategy.group_options()
        if self.steps < 0:
            self._member.enter_as_joiner(**options)
        else:
            self._member.enter_next(self.steps, boundary, waited, **options)

    def _level(self, closure: Callable[[], Any] | None, ready: bool) -> bool:
        """Gives the state of the member with the most completed steps to those that are behind."""
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, (self.steps, self.substeps, ready))
        self.some_are_ready = any(ready for *_, ready in told)
        progress = [(steps, substeps) for steps, substeps, _ in told]
        source = progress.index(max(progress))
        behind = [rank for rank, completed in enumerate(progress) if completed < progress[source]]
        if dist.get_rank() == source and behind:
            live = joining.live_state(self._trainer)
            send([_lightning.dump_checkpoint(self._trainer), live, self._outages.list], behind)
        if dist.get_rank() not in behind:
            return False
        checkpoint, live, outages = receive(source)
        if self.steps < 0:
            self._outages.list = outages
            joining.take_state(self._trainer, checkpoint, live)
            joining.place_in_data(self._trainer)
        else:
            self._run_alone(closure)
            joining.take_weights(self._trainer, checkpoint)
        self._trainer.lightning_module.zero_grad()
        self.steps, self.substeps = progress[source]
        return True

    def _run_alone(self, closure: Callable[[], Any] | None) -> None:
        """Lightning asks every batch for its loss. What it logs may need a group, so the others must come again."""
        self.leave()
        if closure is not None:
            closure()
