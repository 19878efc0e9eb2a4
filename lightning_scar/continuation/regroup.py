"""How a worker moves from one generation to the next: a new group, and the same state on all members."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.nn import Module

from lightning_scar.continuation.model_modes import modes, set_modes
from lightning_scar.continuation.outages import Outages
from lightning_scar.continuation.protocol import Training
from lightning_scar.continuation.step_tensors import StepTensors
from lightning_scar.core.exchange import receive, send
from lightning_scar.elastic.worker.errors import PLANNED, Loss
from lightning_scar.elastic.worker.member import Member


class Generations:
    """The process groups that a worker belongs to, one after the other, and the step that its state is at.

    Args:
        training: The training.
        member: This worker's membership in the job.
        outages: The history of outages, which a replacement receives.

    """

    def __init__(self, training: Training, member: Member, outages: Outages) -> None:
        self._outages = outages
        self._training = training
        self._member = member
        #: What a training step changes in place, once the training has started.
        self.tensors = StepTensors(Module())
        #: The number of completed optimizer steps; -1 if this worker has no state of the training yet.
        self.steps = 0
        #: Completed steps from stale gradients since then.
        self.substeps = 0
        #: How many times this worker had no more batches: at the ends of epochs, and before validations.
        self.epochs = 0
        #: Whether a member of the current generation entered it with ``ready=True``.
        self.some_are_ready = False
        #: Whether a member was a step behind when the current generation formed.
        self.some_were_behind = False

    def enter_first(self) -> None:
        """Join the first generation, in which all workers start."""
        self._member.enter_first(**self._training.group_options())

    def enter_next(
        self, boundary: bool, closure: Callable[[], Any] | None = None, loss: Loss = PLANNED, ready: bool = False
    ) -> bool:
        """Leave the current generation, and join the next one that succeeds.

        Args:
            boundary: Whether this worker is between two steps, not in one.
            closure: The step's closure, for a worker that turns out to be behind.
            loss: How this worker lost the current generation.
            ready: Shared with the others as :attr:`some_are_ready`.

        Returns:
            Whether this worker was behind the others. If so, it now has their state, and its step is completed.

        """
        was_behind = False
        while True:
            self.leave()
            try:
                self._enter(boundary or was_behind, loss)
                was_behind |= self._synchronize(closure, ready, was_behind)
                if dist.is_initialized():
                    self._training.wrap()
                    return was_behind
                loss = PLANNED
            except Exception as error:
                if not self._member.caused_by_peer_loss(error):
                    raise
                loss = Loss.of(error, loss.waited)

    def check_size(self, smallest: int) -> None:
        """End the job if too few workers are left.

        Args:
            smallest: The number of workers that suffices.

        Raises:
            RuntimeError: If there are fewer.

        """
        assert self._member.generation is not None
        present = len(self._member.generation.spawns)
        if present < smallest:
            reason = f"{present} workers are left, fewer than min_world_size={smallest}"
            self._member.give_up(reason)
            raise RuntimeError(
                f"lightning-scar: {reason}. The training stops. Start it again to resume from its last save."
            )

    def leave(self) -> None:
        """Leave the group and unwrap the model."""
        self._training.unwrap()
        self._member.leave()

    def _enter(self, boundary: bool, loss: Loss) -> None:
        options = self._training.group_options()
        if self.steps < 0:
            self._member.enter_as_joiner(**options)
        else:
            self._member.enter_next(self.steps, boundary, loss, **options)

    def _synchronize(self, closure: Callable[[], Any] | None, ready: bool, was_behind: bool) -> bool:
        """Send the state of the member with the most completed steps to those behind it."""
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (self.steps, self.substeps, ready, was_behind, self._outages.finding))
        self._member.check_health()
        self.some_are_ready = any(ready for _, _, ready, _, _ in gathered)
        # A worker may have failed where the others agreed, and a replacement knows nothing.
        self._outages.finding = next((finding for *_, finding in gathered if finding is not None), None)
        progress = [(steps, substeps) for steps, substeps, *_ in gathered]
        source = progress.index(max(progress))
        behind = [rank for rank, completed in enumerate(progress) if completed < progress[source]]
        are_late = any(was_behind for *_, was_behind, _ in gathered)
        self.some_were_behind = are_late or any(progress[rank][0] >= 0 for rank in behind)
        if dist.get_rank() == source and behind:
            present = [modes(self._training.module), self.tensors.moving]
            send([self._training.state(), present, self._outages.list, self.epochs], behind)
        if dist.get_rank() not in behind:
            return False
        state, present, outages, epochs = receive(source)
        self._member.check_health()
        if self.steps < 0:
            self._outages.list, self.epochs = outages, epochs
            self._training.load_state(state)
            module_modes, self.tensors.moving = present
            set_modes(self._training.module, module_modes)
        else:
            self._run_alone(closure)
            self._training.load_weights(state)
        self._training.module.zero_grad()
        self.steps, self.substeps = progress[source]
        return True

    def _run_alone(self, closure: Callable[[], Any] | None) -> None:
        """Run the closure, because Lightning requires a loss of every batch, and then regroup.

        What the closure logs may run a collective, so it runs without a group.
        """
        self.leave()
        if closure is not None:
            closure()
