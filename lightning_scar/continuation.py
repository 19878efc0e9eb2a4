"""A worker's way through an outage: leave the broken group, form the next, make the interrupted step again.

Every optimizer step goes through :meth:`Continuation.step`. A worker stands either *in* a step, whose parameters are
untouched, or *behind* one; these are the two places where generations change.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_scar import _lightning, joining, logs
from lightning_scar.collection import Collection, feasible
from lightning_scar.elastic.errors import CutOffError, RestartError
from lightning_scar.elastic.membership import Member
from lightning_scar.elastic.messages import RESTART_EXIT_CODE
from lightning_scar.generations import Generations
from lightning_scar.kept import calls
from lightning_scar.outage import OutagePolicy, Outages
from lightning_scar.step_start import StepStart, random_state, set_random_state

if TYPE_CHECKING:
    from lightning_scar.strategy import SCARDDPStrategy

#: What a leader announces before a step's collectives, so that all know it behind that step.
_JOIN, _STOP = "join", "stop"

#: Seconds.
_LONG_ENOUGH = 1e9

Closure = Callable[[], Any]
Attempt = Callable[[Closure], Any]


class _BatchEnd(Callback):
    """Raises what came up behind a step, when the loops have counted it: else it would be made twice."""

    def __init__(self, raise_pending: Callable[[], None]) -> None:
        self._raise_pending = raise_pending

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self._raise_pending()


class Continuation:
    """What this worker does when another one dies.

    Args:
        strategy: Makes process groups and wraps the model.
        trainer: Whose training it is.
        member: This worker's part in the generations.
        policy: What survivors do until the replacement is there.

    """

    def __init__(self, strategy: "SCARDDPStrategy", trainer: pl.Trainer, member: Member, policy: OutagePolicy) -> None:
        self.outages = Outages(trainer, member, policy)
        #: The batch of the step under way.
        self.batch: Any = None
        self._strategy = strategy
        self._trainer = trainer
        self._member = member
        self._generations = Generations(strategy, trainer, member, self.outages)
        self._start = StepStart()
        self._collection: Collection | None = None
        self._pending: RuntimeError | None = None
        #: The random generators behind the last step.
        self._random = random_state()

    # -- the beginning and the end of a training -----------------------------------------------------------------

    def set_up(self) -> None:
        """Enters the first generation; a replacement does without a group until it is taken in."""
        logs.inherit(self._trainer)
        if self._member.is_replacement and self._member.generation is None:
            self._generations.steps = -1
            joining.begin_as_joiner(self._trainer)
            return
        if not dist.is_initialized():
            self._generations.enter_first()
        if self._member.attempt > 0:
            logs.go_on(self._trainer)
            calls.share_kept()
        kept = calls.kept()
        if kept is not None:
            calls.resume(self._trainer, kept)

    @property
    def is_joiner(self) -> bool:
        """Whether this worker is a replacement that has not been taken in yet."""
        return self._generations.steps < 0

    def begin(self) -> None:
        """The training loop begins."""
        joining.silence_sigterm_broadcast(self._trainer)
        callbacks: list[Callback] = self._trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, _BatchEnd) for callback in callbacks):
            callbacks.insert(0, _BatchEnd(self._raise_pending))
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda signum, frame: self._member.ask_to_stop(signum))
        self._start = StepStart(self._strategy.lightning_module)
        self.outages.policy = feasible(self.outages.policy, self._trainer)
        if self.is_joiner:
            return
        self._generations.steps = self._trainer.global_step
        logs.note(self._trainer)
        if calls.resumed is not None:
            self._go_on(calls.resumed)
        if calls.is_first_fit:
            self._member.begin()

    def _go_on(self, kept: dict[str, Any]) -> None:
        """Takes up what came with a kept state, but into no checkpoint."""
        _lightning.place_data(self._trainer, [], skip=True)
        self.outages.list = kept["outages"]
        self.outages.rejoined(self._generations.steps)
        set_random_state(calls.random(self._member.slot))

    def end(self) -> None:
        """The training loop is over."""
        if calls.is_first_fit:
            self._member.end()

    # -- a step --------------------------------------------------------------------------------------------------

    def step(self, attempt: Attempt, closure: Closure) -> Any:
        """Makes an optimizer step, whoever dies meanwhile.

        Args:
            attempt: Makes the step, given what computes its gradients and returns the loss.
            closure: Computes the gradients of the present batch.

        """
        if self.is_joiner:
            # Lightning asks every batch for its loss; the gradients are not used.
            closure()
            self._generations.enter_next(boundary=True)
            self._member.begin()
            self._behind_step(asks=False)
            return None
        started = time.monotonic()
        self._start.keep(gradients=self._trainer.accumulate_grad_batches > 1)
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
                self._behind_step(asks=True)
                return output
            if self._survive(closure, self._waited(started)):
                self._behind_step(asks=False)
                return None

    def _waited(self, started: float) -> float:
        seconds = time.monotonic() - started
        # Whoever gave up because of the timeout has waited long enough, whatever the supervisor's own limit is.
        return seconds if seconds < self._strategy.timeout.total_seconds() else _LONG_ENOUGH

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
            self._member.call(_STOP, step)
        elif self._member.joiners_are_ready():
            self._member.call(_JOIN, step)

    def _behind_step(self, asks: bool) -> None:
        """Does what was announced to follow the step, or waits for a full group.

        Args:
            asks: Whether this worker made the step itself, and does not know yet.

        """
        try:
            word = self._member.called(self._generations.steps) if asks else ""
            if word == _STOP:
                _lightning.mark_sigterm(self._trainer)
            else:
                self._take_joiners_in(word)
        except (CutOffError, RestartError) as error:
            self._pending = error

    def _take_joiners_in(self, word: str) -> None:
        # Only a full group leaves the training steps, e.g. for a validation.
        while word == _JOIN or (not self._member.is_full and joining.leaves_training_next(self._trainer)):
            if word != _JOIN:
                self._member.wait_for_joiners()
            if self._member.is_stopping:
                return
            self._generations.enter_next(boundary=True)
            word = ""
        if self._member.is_full:
            self.outages.rejoined(self._generations.steps)

    def _raise_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            raise pending

    # -- an outage -----------------------------------------------------------------------------------------------

    def _can_survive(self, error: Exception) -> bool:
        # A replacement would run the script from its beginning, and come to another fit first. And it could not take
        # the shard of an optimizer in whose step the others are.
        can_join = calls.is_first_fit and not joining.has_sharded_optimizer(self._trainer)
        return can_join and self._member.is_due_to_failure(error)

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
        collection = Collection(self._trainer, policy, self.batch) if policy.on_failure == "buffer" else None
        while not self._generations.some_are_ready:
            # Without a group, so that what the training step logs needs nobody else.
            self._generations.leave()
            if collection is not None:
                collection.run(closure, until=lambda: member.has_news)
            is_full = collection is not None and collection.is_full
            if not is_full:
                member.wait_for_joiners()
            # All go on together, whoever had a reason first; after another death they hold on.
            is_ready = is_full or member.joiners_are_ready() or member.is_stopping
            self._generations.enter_next(boundary=False, ready=is_ready)
            self.outages.regrouped()
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

    def failed(self, error: BaseException) -> None:
        """An error ends the Trainer's call. If another worker's death is behind it, all are started again.

        They begin with the state of this moment; this process ends here.
        """
        if not isinstance(error, RestartError) and not self._member.is_due_to_failure(error):
            if isinstance(error, SIGTERMException | KeyboardInterrupt):
                self._member.end()
            return
        self._strategy.unwrap()
        for logger in self._trainer.loggers:
            logger.save()
        if joining.has_sharded_optimizer(self._trainer):
            for callback in joining.successors(self._trainer):
                callback.save_all(self._trainer)
        self.outages.begin(self._generations.steps)
        try:
            self._member.strand(self._generations.steps)
        except RestartError as restart:
            self.outages.restarting(restart.deaths)
            if restart.keeper == self._member.slot:
                calls.keep({"outages": self.outages.list, "random": self._random})
            calls.keep_random(self._member.slot, self._random)
        self._strategy.checkpoint_io.teardown()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by an exception: the script might take it for its own, and what runs at exit might wait for others.
        os._exit(RESTART_EXIT_CODE)
