"""The engine of continuation: leave the broken group, form the next, repeat the interrupted step.

Every optimizer step goes through :meth:`Continuation.step`, and then :meth:`Continuation.after_step`. When the
generation changes, a worker is either *in* a step, and has not changed the parameters yet, or *between* two steps.
"""

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch.distributed as dist
from torch.nn import Module

from lightning_scar.continuation.cover import Cover
from lightning_scar.continuation.feasibility import feasible
from lightning_scar.continuation.outages import OutagePolicy, Outages
from lightning_scar.continuation.protocol import Training
from lightning_scar.continuation.regroup import Generations
from lightning_scar.continuation.restart_state import save_own_state
from lightning_scar.continuation.snapshot import StepSnapshot, Update, random_state
from lightning_scar.continuation.stale_gradients import StaleGradients
from lightning_scar.continuation.step_generators import StepGenerators
from lightning_scar.elastic.protocol.messages import RESTART_EXIT_CODE
from lightning_scar.elastic.worker.errors import PLANNED, Loss, RestartError, UnevenDataError
from lightning_scar.elastic.worker.member import Member
from lightning_scar.elastic.worker.state_folder import tell_imports

#: What the leader announces before the collectives of a step, so that all members know it after that step.
_JOIN, _STOP = "join", "stop"

#: Seconds; longer than any timeout of the supervisor.
_LONG_ENOUGH = 1e9

Closure = Callable[[], Any]
Attempt = Callable[[Closure], Any]


class Continuation:
    """Lets this worker continue when another one dies.

    Args:
        training: The training.
        member: This worker's membership in the job.
        policy: What survivors do until the replacement has joined.

    """

    def __init__(self, training: Training, member: Member, policy: OutagePolicy) -> None:
        self.outages = Outages(training.log, member, policy)
        #: The batch of the current step.
        self.batch: Any = None
        self._training = training
        self._member = member
        self._generations = Generations(training, member, self.outages)
        if member.is_joiner:
            self._generations.steps = -1
        self._snapshot = StepSnapshot(Module(), training.keep_logs)
        self.generators = StepGenerators(member.slot)
        self._stale_gradients: StaleGradients | None = None
        self._cover: Cover | None = None
        #: Whether this worker made the last step itself, and must still read what was announced for after it.
        self._checks_announcement = False
        #: How this worker lost its group between two steps; ``None`` if it is in one.
        self._left_alone: Loss | None = None
        #: Whether this process has completed a step.
        self._has_stepped = False
        #: The number of completed steps after which this worker had no more batches, for the last time.
        self._left_after = -1
        self._update = Update(training.changes, member.check_health)

    # -- start and end of a training -----------------------------------------------------------------------------

    def enter_first_group(self) -> None:
        """Join the first generation. A replacement has no group until it joins."""
        if not self.is_joiner and not dist.is_initialized():
            self._generations.enter_first()

    @property
    def is_joiner(self) -> bool:
        """Whether this worker is a replacement that has not joined yet."""
        return self._generations.steps < 0

    @property
    def steps(self) -> int:
        """The number of optimizer steps that this worker has completed."""
        return self._generations.steps

    def start(self, steps: int, restart_state: dict[str, Any] | None = None) -> None:
        """Prepare for the first step of this process.

        Args:
            steps: The number of completed optimizer steps; ignored in a replacement.
            restart_state: What was written with the restart state that the training resumed from, if it did.

        """
        self._member.epochs.trainings += 1
        self._left_after, self._generations.epochs = -1, 0
        self._snapshot = StepSnapshot(self._training.module, self._training.keep_logs)
        tensors = self._generations.tensors = self._snapshot.tensors
        self._cover = Cover(self._training, self._member, self.outages, self.generators, tensors)
        self.outages.policy = feasible(self.outages.policy, self._training, warns=self._member.is_leader)
        if self.is_joiner:
            return
        self._generations.steps = steps
        if restart_state is not None:
            self.outages.list = restart_state["outages"]
            self.outages.rejoined(steps)
        if self._training.is_first:
            self._member.begin(self._training.can_admit)

    def finish(self) -> None:
        """Tell the supervisor that the training is over."""
        if self._training.is_first:
            self._member.end()

    def wait_until_over(self) -> None:
        """Wait until the training is over for all: who goes on, and exits, takes along what another one may need."""
        if self._member.generation is not None:
            self._member.wait_until_over(len(self._member.generation.spawns), self._training.timeout)

    # -- a step --------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Let this worker, a replacement, join: it receives the others' state, between two of their steps."""
        self._generations.enter_next(boundary=True)
        self.generators.take_over(self.steps)
        self._member.begin()

    def step(self, attempt: Attempt, closure: Closure) -> Any:
        """Make an optimizer step, and repeat it if another worker dies meanwhile.

        Args:
            attempt: Makes the step, given a function that computes the gradients and returns the loss.
            closure: Computes the gradients of the current batch.

        Returns:
            What ``attempt`` returned; ``None`` if this worker received the completed step from another one.

        """
        started = self._begin_batch()
        self._snapshot.save(self._training.accumulates, self.batch)
        self.generators.begin(self.steps, self._snapshot.random)
        if self._left_alone is not None and self._recover(closure, self._left_alone):
            return None
        while True:
            try:
                self._announce()
                output = self._attempt(attempt, closure)
            except Exception as error:
                if not self._can_survive(error):
                    raise
                loss = self._loss(error, started)
            else:
                self._complete()
                self.outages.stepped()
                self._checks_announcement = True
                return output
            if self._recover(closure, loss):
                return None

    def accumulate(self, compute: Closure, gradients: bool) -> Any:
        """Compute a batch that makes no step, without a group from where another worker dies meanwhile.

        Such a batch runs collectives if it logs with ``sync_dist``, or if DDP gives all ranks the same buffers. From
        then on this worker computes its batches alone, up to the next step, where the survivors come together.

        Args:
            compute: Computes the batch, or the part of it that may run collectives.
            gradients: Whether that adds to the gradients.

        Returns:
            What it returned.

        """
        if not dist.is_initialized():
            return compute()
        started = self._begin_batch()
        self._snapshot.save(gradients, self.batch)
        self.generators.begin(self.steps, self._snapshot.random)
        if self._cover is not None and self._training.batches_in_step == 1:
            self._cover.begin_step()
        try:
            return compute()
        except Exception as error:
            if not self._can_survive(error):
                raise
            self._left_alone = self._loss(error, started)
        self._generations.leave()
        self._snapshot.restore(gradients)
        self.outages.record_failure(self._generations.steps)
        return compute()

    def _begin_batch(self) -> float:
        self._member.epochs.goes_on_after = self.steps, self._generations.epochs
        return time.monotonic()

    def end_epoch(self) -> None:
        """Note that this worker has no more batches for now: its epoch or its training ends, or a validation follows.

        All others must have none, either. One that goes on finds out, and raises an error.
        """
        self._member.epochs.goes_on_after = None
        if self._left_after != self.steps >= 0:
            self._left_after = self.steps
            self._generations.epochs += 1
            self._member.end_epoch(self.steps, self._generations.epochs)

    def _check_not_left_behind(self, error: Exception) -> None:
        ahead = self._member.left_behind_by() if self._member.caused_by_peer_loss(error) else None
        if ahead is not None:
            slot, step = ahead
            reason = f"rank {slot} has no more batches after step {step}, but rank {self._member.slot} has"
            self._member.give_up(reason)
            raise UnevenDataError(reason) from error

    def _loss(self, error: Exception, started: float) -> Loss:
        seconds = time.monotonic() - started
        # A worker whose collective timed out has waited long enough, whatever limit the supervisor has.
        return Loss.of(error, seconds if seconds < self._training.timeout else _LONG_ENOUGH)

    def _attempt(self, attempt: Attempt, closure: Closure) -> Any:
        def computed() -> Any:
            loss = closure()
            self._snapshot.tensors.end_step()
            self.generators.note(self.steps + 1, random_state())
            return loss

        if self._stale_gradients is not None:
            return self._stale_gradients.flush(lambda gradients: self._update.attempt(attempt, gradients))
        assert self._cover is not None
        with self._cover.step(self.steps) if self._cover.is_due(self.batch) else nullcontext():
            return self._update.attempt(attempt, computed)

    @property
    def _is_whole(self) -> bool:
        """Whether the state is that between two steps: an optimizer may communicate after it has changed parameters."""
        counted = self._training.counted_steps
        return not self._update.is_half_made and counted in (None, self._generations.steps)

    def _complete(self) -> None:
        self._generations.steps += 1
        self._generations.substeps = self._stale_gradients.applied if self._stale_gradients is not None else 0
        self._stale_gradients = None
        if not self._has_stepped:
            self._has_stepped = True
            tell_imports()
            self._member.complete_start()

    def _announce(self) -> None:
        """Announce what follows the step, before its collectives."""
        if not self._member.is_leader:
            return
        step = self._generations.steps + 1
        if self._member.is_stopping:
            self._member.announce(_STOP, step)
        elif self._member.joiners_are_ready():
            self._member.announce(_JOIN, step)

    # -- between two steps ---------------------------------------------------------------------------------------

    def after_step(self) -> None:
        """Do what was announced for after the last step. Wait for a complete group if the training requires it.

        Raises:
            RestartError: If all workers will be restarted instead.
            CutOffError: If the supervisor is gone.

        """
        if self._left_alone is not None:
            return
        checks, self._checks_announcement = self._checks_announcement, False
        word = self._member.announced(self._generations.steps) if checks else ""
        if word == _STOP:
            self._training.stop()
            return
        if word == _JOIN and not self._member.is_stopping:
            self._generations.enter_next(boundary=True)
        # Every step comes here, and what follows is asked only where it matters.
        if not self._member.is_full and self._training.leaves_training_next():
            self.complete_group()
        if self._member.is_full and self.outages.current is not None:
            self._training.release_batches()
            self.outages.rejoined(self._generations.steps)

    def complete_group(self) -> None:
        """Wait until no worker is missing, or the job is stopped.

        Raises:
            RestartError: If all workers will be restarted instead.
            CutOffError: If the supervisor is gone.

        """
        if self._left_alone is not None:
            loss, self._left_alone = self._left_alone, None
            self._generations.enter_next(boundary=True, loss=loss)
        while not self._member.is_full:
            # Otherwise one that goes on would wait for this worker, and this one for replacements.
            self._member.end_epoch(self.steps, self._generations.epochs + (self.steps != self._left_after))
            self._member.wait_for_joiners()
            if self._member.is_stopping:
                return
            self._generations.enter_next(boundary=True)

    # -- an outage -----------------------------------------------------------------------------------------------

    def _can_survive(self, error: Exception) -> bool:
        self._check_not_left_behind(error)
        is_possible = self._training.is_first and self._training.can_admit and self._is_whole
        return is_possible and self._member.caused_by_peer_loss(error)

    def _recover(self, closure: Closure, loss: Loss) -> bool:
        """Join the next generation.

        Returns:
            Whether the step is completed: this worker was behind the others and received their state, or some stale
            gradients were applied before the group failed again.

        """
        self._generations.leave()
        self._left_alone = None
        self._snapshot.restore()
        self.outages.record_failure(self._generations.steps)
        is_done = self._stale_gradients is not None and self._stale_gradients.applied > 0
        if is_done:
            self._complete()
        self._stale_gradients = None
        is_done |= self._generations.enter_next(boundary=is_done, closure=closure, loss=loss)
        self.outages.regrouped()
        self._generations.check_size(self.outages.policy.min_world_size)
        while self._generations.some_were_behind:
            if is_done:
                # The others are in the next step already. This worker runs alone up to there, and they wait for it.
                self._generations.leave()
                self._left_alone = PLANNED
                return True
            is_done = self._generations.enter_next(boundary=False, closure=closure)
        if not is_done and not self._member.is_full and self.outages.policy.on_failure in ("buffer", "wait"):
            self._wait_for_joiners(closure)
        return is_done

    def _wait_for_joiners(self, closure: Closure) -> None:
        """Keep the weights until the replacements are ready, and collect gradients meanwhile with ``"buffer"``."""
        member, policy = self._member, self.outages.policy
        stale_gradients = StaleGradients(self._training, policy, self.batch) if policy.on_failure == "buffer" else None
        while not self._generations.some_are_ready:
            # Without a group, so that logging in the training step runs no collective.
            self._generations.leave()
            if stale_gradients is not None:
                stale_gradients.collect(closure, until=lambda: member.has_news)
            is_full = stale_gradients is not None and stale_gradients.is_full
            if not is_full:
                member.wait_for_joiners()
            # All members continue together, as soon as one is ready; after another death they wait again.
            joins = member.joiners_are_ready()
            self._generations.enter_next(boundary=False, ready=is_full or joins or member.is_stopping)
            self.outages.regrouped()
            if joins and not member.is_full:
                # The joiners reported to the previous generation; wait for their report to this one, or no one would
                # announce after this step that they join.
                member.wait_for_joiners()
        self._stale_gradients = stale_gradients
        if stale_gradients is not None and self.outages.current is not None:
            self.outages.current.stale_gradients += stale_gradients.extra

    # -- a restart of all workers ---------------------------------------------------------------------------------

    def caused_by_peer_loss(self, error: BaseException) -> bool:
        """Return whether an error that ends the training was caused by the loss of another worker."""
        return isinstance(error, RestartError) or self._member.caused_by_peer_loss(error)

    def restart(self) -> None:
        """Exit this process with the code that makes the supervisor restart all workers with the present state.

        In the middle of an update there is none, and another worker keeps its own. Return if the job ends instead.
        """
        self._training.unwrap()
        is_whole = self._is_whole
        self._training.prepare_restart(is_whole)
        self.outages.record_failure(self._generations.steps)
        try:
            self._member.strand(self._generations.steps if is_whole else -1)
            return
        except RestartError as restart:
            self.outages.restarting(restart.deaths)
            try:
                if restart.keeper == self._member.slot:
                    self._training.save_restart_state({"outages": self.outages.list})
                if restart.keeper >= 0:
                    save_own_state(self._member.slot, self._training.own_state())
            except OSError as error:
                print(f"lightning-scar: {error}; the last save counts", file=sys.stderr, flush=True)
        self._training.release()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by an exception, which the script might catch. Exit handlers might wait for other workers.
        os._exit(RESTART_EXIT_CODE)
