"""A worker's way through an outage: leave the broken group, form the next, make the interrupted step again.

Every optimizer step goes through :meth:`Continuation.step`, and every moment between two through
:meth:`Continuation.settle`. A worker stands either *in* a step, whose parameters are untouched, or *behind* one; these
are the two places where generations change.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from lightning_scar.continuation.outages import OutagePolicy, Outages
from lightning_scar.continuation.protocol import Training
from lightning_scar.continuation.regroup import Generations
from lightning_scar.continuation.restart_state import keep_random, take_random
from lightning_scar.continuation.snapshot import StepStart, random_state, set_random_state
from lightning_scar.continuation.stale_gradients import Collection, feasible
from lightning_scar.elastic.protocol.messages import RESTART_EXIT_CODE
from lightning_scar.elastic.worker.errors import RestartError
from lightning_scar.elastic.worker.member import Member

#: What a leader announces before a step's collectives, so that all know it behind that step.
_JOIN, _STOP = "join", "stop"

#: Seconds.
_LONG_ENOUGH = 1e9

Closure = Callable[[], Any]
Attempt = Callable[[Closure], Any]


class Continuation:
    """What this worker does when another one dies.

    Args:
        training: Makes steps, and gives and takes the state.
        member: This worker's part in the generations.
        policy: What survivors do until the replacement is there.

    """

    def __init__(self, training: Training, member: Member, policy: OutagePolicy) -> None:
        self.outages = Outages(training.log, member, policy)
        #: The batch of the step under way.
        self.batch: Any = None
        self._training = training
        self._member = member
        self._generations = Generations(training, member, self.outages)
        if member.is_joiner:
            self._generations.steps = -1
        self._start = StepStart()
        self._collection: Collection | None = None
        #: Whether this worker made the last step itself, and does not know yet what follows it.
        self._asks = False
        #: The random generators behind the last step.
        self._random = random_state()

    # -- the beginning and the end of a training -----------------------------------------------------------------

    def enter(self) -> None:
        """Enters the first generation; a replacement does without a group until it is taken in."""
        if not self.is_joiner and not dist.is_initialized():
            self._generations.enter_first()

    @property
    def is_joiner(self) -> bool:
        """Whether this worker is a replacement that has not been taken in yet."""
        return self._generations.steps < 0

    @property
    def steps(self) -> int:
        """How many optimizer steps this worker has completed."""
        return self._generations.steps

    def begin(self, steps: int, kept: dict[str, Any] | None = None) -> None:
        """The training is about to make its first step here.

        Args:
            steps: How many optimizer steps are completed; of no account in a replacement.
            kept: What came with a kept state that it goes on from.

        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda signum, frame: self._member.ask_to_stop(signum))
        self._start = StepStart(self._training.module)
        self.outages.policy = feasible(self.outages.policy, self._training, says_so=self._member.is_leader)
        if self.is_joiner:
            return
        self._generations.steps = steps
        if kept is not None:
            self.outages.list = kept["outages"]
            self.outages.rejoined(steps)
            set_random_state(take_random(self._member.slot) or kept["random"])
        if self._training.is_first:
            self._member.begin(self._training.can_take_in)

    def end(self) -> None:
        """The training is over."""
        if self._training.is_first:
            self._member.end()

    # -- a step --------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Takes this worker, a replacement, in: it has the state of the others then, and stands behind their step."""
        self._generations.enter_next(boundary=True)
        self._member.begin()

    def step(self, attempt: Attempt, closure: Closure) -> Any:
        """Makes an optimizer step, whoever dies meanwhile.

        Args:
            attempt: Makes the step, given what computes its gradients and returns the loss.
            closure: Computes the gradients of the present batch.

        Returns:
            What ``attempt`` returned; ``None`` where the step came from the others.

        """
        started = time.monotonic()
        self._start.keep(gradients=self._training.accumulates)
        while True:
            try:
                self._announce()
                output = self._attempt(attempt, closure)
            except Exception as error:
                if not self._can_survive(error):
                    raise
            else:
                self._complete()
                self.outages.stepped()
                self._asks = True
                return output
            if self._survive(closure, self._waited(started)):
                return None

    def _waited(self, started: float) -> float:
        seconds = time.monotonic() - started
        # Whoever gave up because of the timeout has waited long enough, whatever the supervisor's own limit is.
        return seconds if seconds < self._training.timeout else _LONG_ENOUGH

    def _attempt(self, attempt: Attempt, closure: Closure) -> Any:
        if self._collection is not None:
            return self._collection.flush(attempt)

        def checked() -> Any:
            loss = closure()
            self._member.check_health()
            return loss

        return attempt(checked)

    def _complete(self) -> None:
        self._random = random_state()
        self._generations.steps += 1
        self._generations.substeps = self._collection.applied if self._collection is not None else 0
        self._collection = None

    def _announce(self) -> None:
        """Tells the others, before the collectives of a step, what follows it."""
        if not self._member.is_leader:
            return
        step = self._generations.steps + 1
        if self._member.is_stopping:
            self._member.announce(_STOP, step)
        elif self._member.joiners_are_ready():
            self._member.announce(_JOIN, step)

    # -- between two steps ---------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Does what was announced to follow the last step, or waits for a full group.

        Raises:
            RestartError: If all workers will be started again instead.
            CutOffError: If the supervisor is gone.

        """
        asks, self._asks = self._asks, False
        word = self._member.announced(self._generations.steps) if asks else ""
        if word == _STOP:
            self._training.stop()
            return
        if word == _JOIN and not self._member.is_stopping:
            self._generations.enter_next(boundary=True)
        if self._training.leaves_training_next():
            self.complete_group()
        if self._member.is_full:
            self.outages.rejoined(self._generations.steps)

    def complete_group(self) -> None:
        """Goes from generation to generation until nobody is missing, or the job is to end.

        Raises:
            RestartError: If all workers will be started again instead.
            CutOffError: If the supervisor is gone.

        """
        while not self._member.is_full:
            self._member.wait_for_joiners()
            if self._member.is_stopping:
                return
            self._generations.enter_next(boundary=True)

    # -- an outage -----------------------------------------------------------------------------------------------

    def _can_survive(self, error: Exception) -> bool:
        is_possible = self._training.is_first and self._training.can_take_in
        return is_possible and self._member.caused_by_peer_loss(error)

    def _survive(self, closure: Closure, waited: float) -> bool:
        """Enters the next generation.

        Returns:
            Whether the step is done: this worker was behind the others and has their state now, or part of what it had
            collected was applied before the group broke again.

        """
        self._generations.leave()
        self._start.restore()
        self.outages.begin(self._generations.steps)
        is_done = self._collection is not None and self._collection.applied > 0
        if is_done:
            self._complete()
        self._collection = None
        is_done |= self._generations.enter_next(boundary=is_done, closure=closure, waited=waited)
        self.outages.regrouped()
        self._check_size()
        if not is_done and not self._member.is_full and self.outages.policy.on_failure != "shrink":
            self._hold(closure)
        return is_done

    def _hold(self, closure: Closure) -> None:
        """Lets weights wait until replacements are ready, and collects gradients meanwhile if that is wanted."""
        member, policy = self._member, self.outages.policy
        collection = Collection(self._training, policy, self.batch) if policy.on_failure == "buffer" else None
        while not self._generations.some_are_ready:
            # Without a group, so that what the training step logs needs nobody else.
            self._generations.leave()
            if collection is not None:
                collection.run(closure, until=lambda: member.has_news)
            is_full = collection is not None and collection.is_full
            if not is_full:
                member.wait_for_joiners()
            # All go on together, whoever had a reason first; after another death they hold on.
            joins = member.joiners_are_ready()
            self._generations.enter_next(boundary=False, ready=is_full or joins or member.is_stopping)
            self.outages.regrouped()
            if joins and not member.is_full:
                # The news was of the generation before; without it nobody would be told to join behind this step.
                member.wait_for_joiners()
        self._collection = collection
        if collection is not None and self.outages.present is not None:
            self.outages.present.stale_gradients += collection.stale

    def _check_size(self) -> None:
        assert self._member.generation is not None
        here = len(self._member.generation.spawns)
        if here < self.outages.policy.min_world_size:
            reason = f"{here} workers are left, fewer than min_world_size={self.outages.policy.min_world_size}"
            self._member.give_up(reason)
            raise RuntimeError(
                f"lightning-scar: {reason}. The training stops; it resumes from its last save when it is started again."
            )

    # -- what cannot be mended -----------------------------------------------------------------------------------

    def is_due_to_failure(self, error: BaseException) -> bool:
        """Whether another worker's death is behind an error that ends the training."""
        return isinstance(error, RestartError) or self._member.caused_by_peer_loss(error)

    def restart(self) -> None:
        """Leaves this process, for all workers to be started again with the state of this moment.

        It never returns; the exit code tells the supervisor.
        """
        self._training.unwrap()
        self._training.prepare_restart()
        self.outages.begin(self._generations.steps)
        try:
            self._member.strand(self._generations.steps)
        except RestartError as restart:
            self.outages.restarting(restart.deaths)
            if restart.keeper == self._member.slot:
                self._training.keep({"outages": self.outages.list, "random": self._random})
            keep_random(self._member.slot, self._random)
        self._training.release()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by an exception: the script might take it for its own, and what runs at exit might wait for others.
        os._exit(RESTART_EXIT_CODE)
