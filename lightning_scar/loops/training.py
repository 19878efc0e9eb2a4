"""A loop, as the engine of continuation sees it."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from lightning_scar.continuation.restart_state import keep, newest_kept, note_start, noted_start, share_kept
from lightning_scar.continuation.step import Continuation
from lightning_scar.continuation.wrappers import Wrappers
from lightning_scar.core.ranks import Ranks
from lightning_scar.elastic.worker.member import Member
from lightning_scar.loops.continuation import SCARContinuation
from lightning_scar.loops.position import LoopState

#: Where a kept checkpoint dict holds what else the next start needs.
_KEY = "lightning_scar"


class ContinuedLoop(Protocol):
    """The loop, as far as its :class:`LoopTraining` needs it."""

    state: LoopState

    @property
    def steps(self) -> int:
        """How many optimizer steps are counted."""

    def hand_over(self) -> Any:
        """Return what a process needs to save in the place of a worker that died."""

    def take_over(self, seat: Any) -> None:
        """Save in the place of a worker that died."""

    def take_step(self, checkpoint: dict[str, Any]) -> None:
        """Take the step of the present batch from another rank."""

    def save_and_leave(self) -> None:
        """Save everything, and give the directory back."""

    def leave(self) -> None:
        """Finish the saves under way, and give the directory back."""


class LoopTraining:
    """A :class:`~lightning_scar.continuation.protocol.Training` that is written as a loop.

    Args:
        loop: The loop, whose models and optimizers are made.
        continuation: What the user wants.
        member: This worker's part in the generations.

    Raises:
        ValueError: If something in it cannot be continued.

    """

    #: How many loops of this process have begun.
    _begun = 0

    def __init__(self, loop: ContinuedLoop, continuation: SCARContinuation, member: Member) -> None:
        state = loop.state.parts
        loop.state.framework.check_continuation()
        LoopTraining._begun += 1
        self._number = LoopTraining._begun
        self._loop = loop
        self._framework = loop.state.framework
        self._continuation = continuation
        self._member = member
        self._module = state.module
        self._wrappers = Wrappers(state.modules.values())
        self._closure: Callable[..., Any] | None = None
        self._steps_before = 0
        self._is_updating = False
        self.engine = continuation.engine = Continuation(self, member, continuation.policy)

    @property
    def ranks(self) -> Ranks:
        """This worker among all that there should be."""
        return Ranks(self._member.slot, self._member.world_size)

    @property
    def is_restart(self) -> bool:
        """Whether all workers were started again because one died."""
        return self._member.attempt > 0

    def first_incarnation(self, present: int) -> int | None:
        """The first start of this job; ``None`` if this is it, or it has left no word.

        Args:
            present: The number of this start.

        """
        if not self.is_restart:
            note_start(self._number, present)
            return None
        return noted_start(self._number)

    # -- the beginning and the end -------------------------------------------------------------------------------

    def kept(self) -> dict[str, Any] | None:
        """The state that was kept when all workers were started again; ``None`` if there is none. A collective."""
        if self.is_restart:
            share_kept(self._number)
        kept = newest_kept(self._number)
        if kept is None:
            return None
        # This program wrote it itself.
        checkpoint: dict[str, Any] = torch.load(kept.path, weights_only=False)
        return checkpoint

    def begin(self, kept: dict[str, Any] | None) -> None:
        """The loop is about to begin; a replacement is taken in."""
        self.engine.begin(self._loop.steps, kept[_KEY] if kept is not None else None)
        if self.engine.is_joiner:
            self.engine.join()
        self.count()

    def finish(self) -> None:
        """The last batch is over: goes on when all workers are there, which what follows may need."""
        self.engine.settle()
        self.engine.complete_group()
        self.engine.settle()

    # -- a step --------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[..., Any], batch: Any, update: Callable[[], Any]) -> Any:
        """Makes a step of a batch, or a part of one.

        Args:
            closure: Computes the gradient of the batch, and returns the loss.
            batch: Given to it, unless ``None``.
            update: Steps the optimizers and whatever steps with them.

        Returns:
            What the closure returned for this batch.

        Raises:
            RuntimeError: If the batch before was not counted.
            ValueError: If gradients of other batches are wanted, but the closure takes none.

        """
        if self._uncounted:
            raise RuntimeError("call step() once behind each training_step(), which saves and counts the batch")
        if batch is None and self.engine.outages.policy.on_failure == "buffer":
            raise ValueError(
                "on_failure='buffer' computes gradients of other batches, too: give the closure an argument, and say "
                "training_step(closure, batch)"
            )
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

        self.engine.settle()
        self._framework.has_joined()
        self.count()
        if self._framework.synchronizes:
            self.engine.step(attempt, gradients)
        else:
            with self._wrappers.no_sync():
                gradients()
            update()
        return losses[-1]

    def count(self) -> None:
        """The loop has counted all batches whose steps are done."""
        self._steps_before = self.engine.steps

    @property
    def _uncounted(self) -> int:
        """How many batches it has not: 0 or 1."""
        return min(self.engine.steps - self._steps_before, 1)

    def fail(self, error: BaseException) -> None:
        """An error ends the loop. If another worker's death is behind it, all are started again.

        They begin with the state of this moment; this process ends here.
        """
        if self.engine.is_due_to_failure(error) and not self._is_updating:
            self.engine.restart()
        elif isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and not error.code):
            self._member.end()

    # -- what the engine asks for --------------------------------------------------------------------------------

    def group_options(self) -> dict[str, Any]:
        """How groups are made."""
        return self._continuation.group_options()

    @property
    def timeout(self) -> float:
        """Of a collective, in seconds."""
        return self._continuation.timeout.total_seconds()

    def wrap(self) -> None:
        """Makes the wrappers anew that the user holds."""
        self._wrappers.wrap()
        self._framework.regroup(dist.get_rank(), dist.get_world_size(), self._member.local_rank)

    def unwrap(self) -> None:
        """Makes the wrappers pass everything through."""
        self._wrappers.unwrap()
        self._framework.regroup(0, 1, 0)

    @property
    def module(self) -> Module:
        """All models in one."""
        return self._module

    def state(self) -> Any:
        """The checkpoint dict behind the last step, and the seat."""
        return [self._loop.state.dump(behind=self._uncounted), self._loop.hand_over()]

    def take_state(self, state: Any) -> None:
        """Takes another's place behind its step."""
        checkpoint, seat = state
        self._loop.state.take(checkpoint)
        self._loop.take_over(seat)
        self._framework.joins()

    def take_weights(self, state: Any) -> None:
        """Takes what the step changed."""
        self._loop.take_step(state[0])

    @property
    def accumulates(self) -> bool:
        """Gradients may always be there: a loop sets them to zero when it likes."""
        return True

    @property
    def is_first(self) -> bool:
        """Whether it is the first loop of this program."""
        return self._number == 1

    @property
    def can_take_in(self) -> bool:
        """Not in the midst of an update, which cannot be made again."""
        return not self._is_updating

    def leaves_training_next(self) -> bool:
        """Nobody knows: a loop takes joiners in right before a step, when all of it before is over."""
        return False

    def stop(self) -> None:
        """Saves, and ends the program as the signal would have."""
        self._loop.save_and_leave()
        self._member.end()
        raise SystemExit(128 + 15)

    def extra_batches(self) -> Iterator[Any] | None:
        """Those of the loop, if it has any."""
        return self._framework.extra_batches(seed=self._loop.steps * self._member.world_size + self._member.slot)

    def compute_gradient(self, batch: Any) -> None:
        """With the step's own closure."""
        assert self._closure is not None
        self._module.zero_grad()
        with self._framework.undivided():
            self._closure(batch)

    def samples(self, batch: Any) -> int:
        """The size of the first dimension of the first tensor in it; 1 if there is none."""
        sizes = (len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
        return next(sizes, 1)

    @property
    def micro_batches(self) -> int:
        """How many batches make a step."""
        return self._framework.micro_batches

    def log(self, metrics: dict[str, float]) -> None:
        """To nobody: the user asks :attr:`SCARContinuation.outages`."""

    def prepare_restart(self) -> None:
        """Nothing: every worker holds everything."""

    def keep(self, more: dict[str, Any]) -> None:
        """Writes the state behind the last step."""
        keep({**self._loop.state.dump(behind=self._uncounted), _KEY: more}, self._number, self.engine.steps)

    def release(self) -> None:
        """Finishes the saves under way."""
        self._loop.leave()
