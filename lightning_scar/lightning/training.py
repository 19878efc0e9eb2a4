"""A Trainer's ``fit``, as the engine of continuation sees it."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_scar.continuation.outages import OutagePolicy
from lightning_scar.continuation.restart_state import share_kept
from lightning_scar.continuation.stale_gradients import shuffled_anew
from lightning_scar.continuation.step import Continuation
from lightning_scar.elastic.worker.errors import CutOffError, RestartError
from lightning_scar.elastic.worker.member import Member
from lightning_scar.lightning import loggers, private, replacement
from lightning_scar.lightning.restart import calls


class _BatchEnd(Callback):
    """Raises what came up behind a step, when the loops have counted it: else it would be made twice."""

    def __init__(self, raise_pending: Callable[[], None]) -> None:
        self._raise_pending = raise_pending

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self._raise_pending()


class Wrapping(Protocol):
    """The strategy, as far as a :class:`Fit` needs it."""

    checkpoint_io: Any

    def group_options(self) -> dict[str, Any]:
        """Return how the process group of any generation is made."""

    @property
    def timeout(self) -> timedelta:
        """How long a worker is blocked in a collective before it gives up."""

    def wrap(self) -> None:
        """Wrap the model for the present generation."""

    def unwrap(self) -> None:
        """Make the model compute alone."""


class Fit:
    """A :class:`~lightning_scar.continuation.protocol.Training` that a Trainer makes.

    Args:
        strategy: Makes process groups and wraps the model.
        trainer: Whose training it is.
        member: This worker's part in the generations.
        policy: What survivors do until a replacement is there.

    """

    def __init__(self, strategy: Wrapping, trainer: pl.Trainer, member: Member, policy: OutagePolicy) -> None:
        self._strategy = strategy
        self._trainer = trainer
        self._member = member
        self._pending: RuntimeError | None = None
        self.continuation = Continuation(self, member, policy)

    # -- the beginning, and each step ----------------------------------------------------------------------------

    def set_up(self) -> None:
        """Enters the first generation, or prepares to be taken in; finds out what to go on from."""
        loggers.inherit(self._trainer)
        self.continuation.enter()
        if self.continuation.is_joiner:
            replacement.begin_as_joiner(self._trainer)
            return
        if self._member.attempt > 0:
            loggers.go_on(self._trainer)
            share_kept(calls.number)
        kept = calls.kept()
        if kept is not None:
            calls.resume(self._trainer, kept)

    def begin(self) -> None:
        """The training loop begins."""
        private.silence_sigterm_broadcast(self._trainer)
        callbacks: list[Callback] = self._trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, _BatchEnd) for callback in callbacks):
            callbacks.insert(0, _BatchEnd(self._raise_pending))
        if not self.continuation.is_joiner:
            loggers.note(self._trainer)
            if calls.resumed is not None:
                private.place_data(self._trainer, [], skip=True)
        self.continuation.begin(self._trainer.global_step, calls.resumed)

    def step(self, attempt: Callable[[Callable[[], Any]], Any], closure: Callable[[], Any]) -> Any:
        """Makes an optimizer step; see :meth:`Continuation.step`."""
        if self.continuation.is_joiner:
            # Lightning asks every batch for its loss; the gradients are not used.
            closure()
            self.continuation.join()
            output = None
        else:
            output = self.continuation.step(attempt, closure)
        try:
            self.continuation.settle()
        except (CutOffError, RestartError) as error:
            self._pending = error
        return output

    def _raise_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            raise pending

    # -- what the engine asks for --------------------------------------------------------------------------------

    def group_options(self) -> dict[str, Any]:
        """How groups are made."""
        return self._strategy.group_options()

    @property
    def timeout(self) -> float:
        """Of a collective, in seconds."""
        return self._strategy.timeout.total_seconds()

    def wrap(self) -> None:
        """Wraps the model for the present generation."""
        self._strategy.wrap()

    def unwrap(self) -> None:
        """Makes the model compute alone."""
        self._strategy.unwrap()

    @property
    def module(self) -> pl.LightningModule:
        """The model."""
        return self._trainer.lightning_module

    def state(self) -> Any:
        """The checkpoint dict, and what is in no checkpoint."""
        return [private.dump_checkpoint(self._trainer), replacement.live_state(self._trainer)]

    def take_state(self, state: Any) -> None:
        """Takes another's place in the middle of its loops, and in the data."""
        replacement.take_state(self._trainer, *state)
        private.place_in_data(self._trainer)

    def take_weights(self, state: Any) -> None:
        """Takes what an optimizer step changes."""
        replacement.take_weights(self._trainer, state[0])

    @property
    def accumulates(self) -> bool:
        """Whether a step has several batches."""
        return self.micro_batches > 1

    @property
    def is_first(self) -> bool:
        """Whether it is the first call of a Trainer."""
        return calls.is_first_fit

    @property
    def can_take_in(self) -> bool:
        """Nobody could take the shard of an optimizer in whose step the others are."""
        return not replacement.has_sharded_optimizer(self._trainer)

    def leaves_training_next(self) -> bool:
        """Whether a validation or the end follows."""
        return private.leaves_training_next(self._trainer)

    def stop(self) -> None:
        """Ends the loops behind this batch."""
        private.mark_sigterm(self._trainer)

    def extra_batches(self) -> Iterator[Any] | None:
        """Those of the only loader, if there is one with a map-style data set."""
        trainer = self._trainer
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader) or loader.batch_size is None:
            return None
        if isinstance(loader.dataset, IterableDataset):
            return None
        return shuffled_anew(loader, seed=trainer.global_step * trainer.world_size + trainer.global_rank)

    def compute_gradient(self, batch: Any) -> None:
        """As a training step does."""
        private.compute_gradient(self._trainer, batch)

    def samples(self, batch: Any) -> int:
        """As Lightning's logging counts them."""
        return private.batch_size(self._trainer, batch)

    @property
    def micro_batches(self) -> int:
        """How many batches make a step."""
        return self._trainer.accumulate_grad_batches

    def log(self, metrics: dict[str, float]) -> None:
        """To the Trainer's loggers."""
        for logger in self._trainer.loggers:
            logger.log_metrics(metrics, step=private.logger_step(self._trainer))

    def prepare_restart(self) -> None:
        """Saves logs, and shards that nobody else has."""
        for logger in self._trainer.loggers:
            logger.save()
        if replacement.has_sharded_optimizer(self._trainer):
            for callback in replacement.scar_checkpoints(self._trainer):
                callback.save_all(self._trainer)

    def keep(self, more: dict[str, Any]) -> None:
        """Writes the state of this call."""
        calls.keep(more)

    def release(self) -> None:
        """Finishes what the checkpoint IO has under way."""
        self._strategy.checkpoint_io.teardown()
