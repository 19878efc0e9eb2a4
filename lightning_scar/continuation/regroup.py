"""How a worker goes from one generation to the next: one group, one state."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from lightning_scar.continuation.outages import Outages
from lightning_scar.continuation.protocol import Training
from lightning_scar.core.exchange import receive, send
from lightning_scar.elastic.worker.member import Member


class Generations:
    """The process groups that a worker is in, one after the other, and the state that it shares with their members.

    Args:
        training: Whose state it is.
        member: This worker, as the supervisor knows it.
        outages: The history that members share.

    """

    def __init__(self, training: Training, member: Member, outages: Outages) -> None:
        self._outages = outages
        self._training = training
        self._member = member
        #: How many optimizer steps this worker has completed; -1 if it has no state of the training yet.
        self.steps = 0
        #: How many of the steps that stale gradients made it has completed since.
        self.substeps = 0
        #: Whether some member of the present generation entered it ``ready``.
        self.some_are_ready = False

    def enter_first(self) -> None:
        """Enters the generation that all workers start in."""
        self._member.enter_first(**self._training.group_options())

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
                    self._training.wrap()
                    return was_behind
            except Exception as error:
                if not self._member.caused_by_peer_loss(error):
                    raise

    def leave(self) -> None:
        """Closes the group and makes the model compute alone."""
        self._training.unwrap()
        self._member.leave()

    def _enter(self, boundary: bool, waited: float) -> None:
        options = self._training.group_options()
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
            send([self._training.state(), self._outages.list], behind)
        if dist.get_rank() not in behind:
            return False
        state, outages = receive(source)
        if self.steps < 0:
            self._outages.list = outages
            self._training.take_state(state)
        else:
            self._run_alone(closure)
            self._training.take_weights(state)
        self._training.module.zero_grad()
        self.steps, self.substeps = progress[source]
        return True

    def _run_alone(self, closure: Callable[[], Any] | None) -> None:
        """Every batch is asked for its loss. What it logs may need a group, so the others must come again."""
        self.leave()
        if closure is not None:
            closure()
