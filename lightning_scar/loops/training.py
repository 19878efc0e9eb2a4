"""A loop, as the engine of continuation sees it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from lightning_scar.continuation.restart_state import (
    drop_restart_state,
    newest_restart_state,
    note_incarnation,
    noted_incarnation,
    pop_own_state,
    save_restart_state,
    share_restart_state,
)
from lightning_scar.continuation.snapshot import changes
from lightning_scar.continuation.step import Continuation
from lightning_scar.continuation.step_generators import StepGenerators
from lightning_scar.continuation.wrappers import Wrappers
from lightning_scar.core.random_generators import set_random_generators
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.signals import PassedOnSignals, stop_signals
from lightning_scar.elastic.worker.member import Member
from lightning_scar.loops.continuation import SCARContinuation
from lightning_scar.loops.position import LoopState

#: Where a restart_state checkpoint dict holds what else the next start needs.
_KEY = "lightning_scar"


class ContinuedLoop(Protocol):
    """What a :class:`LoopTraining` requires of its loop."""

    state: LoopState

    @property
    def steps(self) -> int:
        """The number of counted optimizer steps."""

    def hand_over(self) -> Any:
        """Return what a replacement needs to continue the saves of a dead worker."""

    def take_over(self, ticket: Any) -> None:
        """Continue the saves of a dead worker."""

    def load_step(self, checkpoint: dict[str, Any]) -> None:
        """Load the step of the current batch from another rank."""

    def save_and_leave(self) -> None:
        """Save everything, and release the directory."""

    def leave(self) -> None:
        """Finish pending saves, and release the directory."""


class LoopTraining:
    """A :class:`~lightning_scar.continuation.protocol.Training` that is written as a loop.

    Args:
        loop: The loop, with its models and optimizers.
        continuation: The user's options.
        member: This worker's membership in the job.

    Raises:
        ValueError: If the loop cannot continue after a failure.

    """

    #: The number of loops that this process has started.
    _started = 0

    def __init__(self, loop: ContinuedLoop, continuation: SCARContinuation, member: Member) -> None:
        state = loop.state.parts
        loop.state.framework.check_continuation()
        LoopTraining._started += 1
        self._number = LoopTraining._started
        self._loop = loop
        self._framework = loop.state.framework
        self._continuation = continuation
        self._member = member
        self._module = state.module
        self._wrappers = Wrappers(state.modules.values())
        self._closure: Callable[..., Any] | None = None
        self._steps_before = 0
        self._is_updating = False
        self._batches_in_step = 0
        #: The handlers of signals that end the job, from the start on.
        self.signals: PassedOnSignals | None = None
        self.engine = continuation.engine = Continuation(self, member, continuation.policy)
        loop.state.data.at_end = self.engine.end_epoch

    @property
    def ranks(self) -> Ranks:
        """This worker's rank in the complete group."""
        return Ranks(self._member.slot, self._member.world_size)

    @property
    def is_restart(self) -> bool:
        """Whether all workers were restarted after a failure."""
        return self._member.attempt > 0

    def first_incarnation(self, present: int) -> int | None:
        """Return the incarnation of the job's first start; ``None`` if this is the first, or it is unknown.

        Args:
            present: The incarnation of this start.

        """
        if not self.is_restart:
            note_incarnation(self._number, present)
            return None
        return noted_incarnation(self._number)

    # -- start and end -------------------------------------------------------------------------------------------

    def restart_state(self) -> dict[str, Any] | None:
        """Return the state that was written for this restart; ``None`` if there is none. A collective."""
        if self.is_restart:
            share_restart_state(self._number)
        restart_state = newest_restart_state(self._number)
        if restart_state is None:
            return None
        # Safe, because this program wrote the file itself.
        checkpoint: dict[str, Any] = torch.load(restart_state.path, weights_only=False)
        slot, step = self._member.slot, checkpoint["global_step"]
        own = pop_own_state(slot, step)
        # One that was killed goes on with the other's.
        return {**checkpoint, "random": {**checkpoint["random"], **StepGenerators(slot).plain(step)}, **own}

    def start(self, restart_state: dict[str, Any] | None) -> None:
        """Start the engine; a replacement joins here."""
        self.signals = PassedOnSignals(stop_signals(), self._member.ask_to_stop)
        self.engine.start(self._loop.steps, restart_state[_KEY] if restart_state is not None else None)
        if restart_state is not None:
            set_random_generators(restart_state["random"])
        if self.engine.is_joiner:
            self.engine.join()
        self.count()

    def finish(self) -> None:
        """Wait for the complete group after the last batch, because what follows may require it."""
        self.engine.end_epoch()
        self.engine.after_step()
        self.engine.complete_group()
        self.engine.after_step()

    def end(self) -> None:
        """Note that the loop is over, and that the directory holds its last state."""
        drop_restart_state(self._number)
        self.engine.finish()

    # -- a step --------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[..., Any], batch: Any, update: Callable[[], Any]) -> Any:
        """Make an optimizer step, or accumulate the gradient of one batch.

        Args:
            closure: Computes the gradient of the batch, and returns the loss.
            batch: The argument of the closure, unless ``None``.
            update: Steps the optimizers and schedulers.

        Returns:
            What the closure returned for this batch.

        Raises:
            RuntimeError: If the batch before was not counted.
            ValueError: With ``on_failure="buffer"``, if there is no batch.

        """
        self._check_call(batch)
        self._closure, self.engine.batch = closure, batch
        losses = []

        def gradients() -> Any:
            losses.append(closure() if batch is None else closure(batch))
            return losses[-1]

        def attempt(compute: Callable[[], Any]) -> None:
            compute()
            self._is_updating = True
            with self._framework.counting_all(self._member.world_size):
                update()
            self._is_updating = False

        self.engine.after_step()
        self._framework.before_step()
        self.count()
        self._batches_in_step += 1
        if self._framework.synchronizes:
            self.engine.step(attempt, gradients)
            self._batches_in_step = 0
        else:
            with self._wrappers.no_sync():
                self.engine.accumulate(gradients, gradients=True)
            update()
        return losses[-1]

    def _check_call(self, batch: Any) -> None:
        if self._uncounted:
            raise RuntimeError("call step() once after each training_step(), to count the batch and save")
        if batch is None and self.engine.outages.policy.on_failure == "buffer":
            raise ValueError(
                "on_failure='buffer' also computes gradients of other batches: let the closure take a batch, and call "
                "training_step(closure, batch)"
            )

    def count(self) -> None:
        """Note that the loop has counted all batches with completed steps."""
        self._steps_before = self.engine.steps

    @property
    def _uncounted(self) -> int:
        """The number of batches that are not counted: 0 or 1."""
        return min(self.engine.steps - self._steps_before, 1)

    def fail(self, error: BaseException) -> None:
        """Restart all workers with the present state if an error was caused by the loss of another one.

        In that case this process exits here.
        """
        if self.engine.caused_by_peer_loss(error):
            self.engine.restart()
        elif isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and not error.code):
            self._member.end()

    # -- what the engine asks for --------------------------------------------------------------------------------

    def group_options(self) -> dict[str, Any]:
        """Return the arguments of ``init_process_group``."""
        return self._continuation.group_options()

    @property
    def timeout(self) -> float:
        """The timeout of a collective, in seconds."""
        return self._continuation.timeout.total_seconds()

    def wrap(self) -> None:
        """Rebuild the DDP wrappers that the user holds."""
        self._wrappers.wrap()
        self._framework.regroup(dist.get_rank(), dist.get_world_size(), self._member.local_rank)

    def unwrap(self) -> None:
        """Make the DDP wrappers call their model directly."""
        self._wrappers.unwrap()
        self._framework.regroup(0, 1, 0)

    @property
    def module(self) -> Module:
        """All models in one module."""
        return self._module

    def state(self) -> Any:
        """Return the checkpoint dict at the present place in the data, and what continues the saves."""
        if not self._uncounted and self._loop.state.data.has_just_begun:
            # The loop has gone on to the next epoch after the last step.
            self._loop.state.record_position()
        return [self._loop.state.dump(uncounted=self._uncounted), self._loop.hand_over()]

    def load_state(self, state: Any) -> None:
        """Load another member's state and data position, after its step."""
        checkpoint, ticket = state
        self._loop.state.load(checkpoint)
        self._loop.take_over(ticket)
        self._framework.on_join()

    def load_weights(self, state: Any) -> None:
        """Load what the step changed."""
        self._loop.load_step(state[0])

    def changes(self) -> int:
        """Return a number that grows with each change of parameters or optimizer state."""
        return changes(self._loop.state.parts.inner_optimizers)

    @property
    def counted_steps(self) -> None:
        """Nothing: a batch may be counted later than its step is completed."""

    @property
    def accumulates(self) -> bool:
        """Always true: a loop may zero its gradients at any time."""
        return True

    @property
    def is_first(self) -> bool:
        """Whether this is the first loop of the program."""
        return self._number == 1

    @property
    def can_admit(self) -> bool:
        """Whether no update is in progress, because an update cannot be repeated."""
        return not self._is_updating

    def leaves_training_next(self) -> bool:
        """Return ``False``: a loop admits joiners right before a step, so nothing else can follow."""
        return False

    def stop(self) -> None:
        """Save, and exit with the code of SIGTERM."""
        self._loop.save_and_leave()
        self._member.end()
        raise SystemExit(128 + 15)

    def extra_batches(self) -> Iterator[Any] | None:
        """Return the framework's extra batches, if it has any."""
        seed = self._loop.steps * self._member.world_size + self._member.slot
        return self._framework.extra_batches(self._loop.state.data.loader, seed)

    def compute_gradient(self, batch: Any, ago: int = 0) -> Any:
        """Compute the gradient with the step's own closure. Return what it returns."""
        assert self._closure is not None
        self._module.zero_grad()
        with self._framework.undivided():
            return self._closure(batch)

    def samples(self, batch: Any) -> int:
        """Return the first dimension of the first tensor in a batch; 1 if there is none."""
        sizes = (len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
        return next(sizes, 1)

    @property
    def micro_batches(self) -> int:
        """The number of batches in a step."""
        return self._framework.micro_batches

    def why_unknown(self, slot: int) -> str | None:
        """Return why the batches of missing workers are unknown; ``None`` before the first batch."""
        if self._closure is None:
            return None
        if self.engine.batch is None:
            return "the closure computes a batch of its own; call training_step(closure, batch)"
        return self._loop.state.data.why_batches_unknown(slot, self._positions.start)

    def batches_of(self, slot: int) -> list[Any]:
        """Return the batches of another rank since the last optimizer step."""
        batches = self._loop.state.data.batches_of(slot, self._positions)
        return [batch for batch in batches if batch is not None]

    @property
    def _positions(self) -> range:
        end = self._loop.state.data.position + 1
        return range(end - self.batches_in_step, end)

    def release_batches(self) -> None:
        """Stop loading batches of other ranks."""
        self._loop.state.data.release_batches()

    @property
    def batches_in_step(self) -> int:
        """The number of batches since the last optimizer step."""
        return self._batches_in_step

    def covering(self, share: float) -> AbstractContextManager[None]:
        """Return a context in which the framework takes a batch for one that makes no step."""
        return self._framework.accumulating()

    def counting_covered(self, scale: float) -> AbstractContextManager[None]:
        """Do nothing: the user logs."""
        return nullcontext()

    def keep_logs(self) -> Callable[[], object]:
        """Return a function that does nothing: loops log for themselves."""
        return lambda: None

    def wrappers(self) -> list[DistributedDataParallel]:
        """Return the present wrappers of the models."""
        return self._wrappers.present()

    def log(self, metrics: dict[str, float]) -> None:
        """Do nothing: the user reads :attr:`SCARContinuation.outages`."""

    def prepare_restart(self, is_whole: bool) -> None:
        """Do nothing: every worker holds the complete state."""

    def own_state(self) -> dict[str, Any]:
        """Return the place in the data, and all random numbers."""
        state = self._loop.state.dump(uncounted=self._uncounted)
        return {name: state[name] for name in ("global_step", "loop", "random")}

    def save_restart_state(self, more: dict[str, Any]) -> None:
        """Write the state after the last step."""
        save_restart_state(
            {**self._loop.state.dump(uncounted=self._uncounted), _KEY: more}, self._number, self.engine.steps
        )

    def release(self) -> None:
        """Finish pending saves."""
        self._loop.leave()
