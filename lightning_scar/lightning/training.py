"""A Trainer's ``fit`` as a training that survives the death of workers."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_scar.continuation.outages import OutagePolicy
from lightning_scar.continuation.restart_state import share_restart_state
from lightning_scar.continuation.snapshot import changes, random_state
from lightning_scar.continuation.stale_gradients import reshuffled
from lightning_scar.continuation.step import Continuation
from lightning_scar.elastic.worker.errors import FinalError
from lightning_scar.elastic.worker.member import Member
from lightning_scar.lightning import loggers, private, private_logs, replacement
from lightning_scar.lightning.covered_logs import CoveredLogs
from lightning_scar.lightning.data import TrainingData
from lightning_scar.lightning.moment import Beginnings, keep_random
from lightning_scar.lightning.preemption import Preemption
from lightning_scar.lightning.restart import trainer_calls


class _Ends(Beginnings):
    """Notes the end of an epoch, too, and lets the random numbers that it keeps outlive this process."""

    def __init__(self, continuation: Continuation) -> None:
        super().__init__()
        self._continuation = continuation

    def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
        return Callback, ()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        keep_random(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_epoch_end(trainer)
        self._continuation.end_epoch()

    @override
    def keep_random(self) -> None:
        super().keep_random()
        self._continuation.generators.note(self._continuation.steps, random_state())


class GroupStrategy(Protocol):
    """What a :class:`TrainerTraining` requires of the strategy."""

    checkpoint_io: Any
    model: Any

    def group_options(self) -> dict[str, Any]:
        """Return the arguments of ``init_process_group``, the same for every generation."""

    @property
    def timeout(self) -> timedelta:
        """The time after which a blocked collective fails."""

    def wrap(self) -> None:
        """Wrap the model for the current generation."""

    def unwrap(self) -> None:
        """Remove the wrapper, so that the model works without a group."""


class TrainerTraining:
    """A :class:`~lightning_scar.continuation.protocol.Training` that a Trainer runs.

    Args:
        strategy: Creates process groups and wraps the model.
        trainer: The trainer.
        member: This worker's membership in the job.
        policy: What survivors do until a replacement has joined.

    """

    def __init__(self, strategy: GroupStrategy, trainer: pl.Trainer, member: Member, policy: OutagePolicy) -> None:
        self._strategy = strategy
        self._trainer = trainer
        self._member = member
        #: An error of a completed step, to be raised when the loops have counted it; else the step would be repeated.
        self._pending: RuntimeError | None = None
        self._data = TrainingData.of(trainer)
        self._logs = CoveredLogs(trainer)
        self.continuation = Continuation(self, member, policy)

    # -- start, and each step ------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Join the first generation and find what to resume from; a replacement prepares to join later."""
        Preemption.of(self._trainer)
        loggers.reuse_versions(self._trainer)
        self.continuation.enter_first_group()
        if self.continuation.is_joiner:
            replacement.prepare_joiner(self._trainer)
            return
        if self._member.attempt > 0:
            loggers.append_to_files(self._trainer)
            share_restart_state(trainer_calls.number)
        restart_state = trainer_calls.restart_state()
        if restart_state is not None:
            trainer_calls.resume(self._trainer, restart_state)

    def start(self) -> None:
        """Prepare for the first step, when the training loop starts."""
        private.silence_sigterm_broadcast(self._trainer)
        callbacks: list[Callback] = self._trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, _Ends) for callback in callbacks):
            callbacks.insert(0, _Ends(self.continuation))
        # Not before the hooks of the batch, which no start would call again. Their collectives find no group.
        private.after_batches(self._trainer, self._raise_pending)
        if not self.continuation.is_joiner:
            loggers.share_versions(self._trainer)
        self.continuation.start(self._trainer.global_step, trainer_calls.resumed)
        if trainer_calls.moment is not None and not self.continuation.is_joiner:
            trainer_calls.moment.go_on()

    def step(self, attempt: Callable[[Callable[[], Any]], Any], closure: Callable[[], Any]) -> Any:
        """Make an optimizer step; see :meth:`Continuation.step`."""
        if self.continuation.is_joiner:
            # Lightning requires a loss of every batch. The gradients are not used.
            closure()
            self.continuation.join()
            output = None
        else:
            output = self.continuation.step(attempt, closure)
        try:
            self.continuation.after_step()
        except FinalError as error:
            self._pending = error
        return output

    def _raise_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            raise pending

    # -- what the engine asks for --------------------------------------------------------------------------------

    def group_options(self) -> dict[str, Any]:
        """Return the arguments of ``init_process_group``."""
        return self._strategy.group_options()

    @property
    def timeout(self) -> float:
        """The timeout of a collective, in seconds."""
        return self._strategy.timeout.total_seconds()

    def wrap(self) -> None:
        """Wrap the model for the current generation."""
        self._strategy.wrap()

    def unwrap(self) -> None:
        """Remove the wrapper, so that the model works without a group."""
        self._strategy.unwrap()

    @property
    def module(self) -> pl.LightningModule:
        """The model."""
        return self._trainer.lightning_module

    def state(self) -> Any:
        """Return the checkpoint dict, and what a replacement needs beside it."""
        checkpoint = private.dump_checkpoint(self._trainer)
        return [checkpoint, replacement.live_state(self._trainer, checkpoint)]

    def load_state(self, state: Any) -> None:
        """Load another member's state, in the middle of its loops, and its data position."""
        replacement.load_state(self._trainer, *state)
        self._data.seek()

    def load_weights(self, state: Any) -> None:
        """Load what an optimizer step changes."""
        replacement.load_weights(self._trainer, *state)

    def changes(self) -> int:
        """Return a number that grows with each change of parameters or optimizer state."""
        return changes(self._trainer.optimizers)

    @property
    def counted_steps(self) -> int | None:
        """The number of steps that the Trainer has counted, in its training loop."""
        return self._trainer.global_step if self._trainer.training else None

    @property
    def accumulates(self) -> bool:
        """Whether a step has several batches."""
        return self.micro_batches > 1

    @property
    def is_first(self) -> bool:
        """Whether this is the first call of a Trainer."""
        return trainer_calls.is_first_fit

    @property
    def can_admit(self) -> bool:
        """Whether no optimizer is sharded, because a replacement could not get a shard during a step."""
        return not replacement.has_sharded_optimizer(self._trainer)

    def leaves_training_next(self) -> bool:
        """Return whether a validation or the end of the training follows."""
        return private.leaves_training_next(self._trainer)

    def stop(self) -> None:
        """End the loops after this batch."""
        private.mark_sigterm(self._trainer)

    def extra_batches(self) -> Iterator[Any] | None:
        """Return batches of the only loader, if its dataset is map-style."""
        trainer = self._trainer
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader) or loader.batch_size is None:
            return None
        if isinstance(loader.dataset, IterableDataset):
            return None
        seed = trainer.global_step * trainer.world_size + trainer.global_rank
        return (private.transferred(trainer, batch) for batch in reshuffled(loader, seed))

    def compute_gradient(self, batch: Any, ago: int = 0) -> Any:
        """Compute the gradient as a training step does. Return the loss."""
        return private.compute_gradient(self._trainer, batch, ago)

    def samples(self, batch: Any) -> int:
        """Return the number of samples as Lightning's logging counts them."""
        return private.batch_size(self._trainer, batch)

    @property
    def micro_batches(self) -> int:
        """The number of batches in a step."""
        return self._trainer.accumulate_grad_batches

    def why_unknown(self, slot: int) -> str | None:
        """Return why the batches of missing workers are unknown."""
        return self._data.why_batches_unknown(slot, self._positions.start)

    def batches_of(self, slot: int) -> list[Any]:
        """Return the batches of another rank since the last optimizer step."""
        batches = self._data.batches_of(slot, self._positions)
        return [private.transferred(self._trainer, batch) for batch in batches if batch is not None]

    @property
    def _positions(self) -> range:
        end = self._data.position + 1
        return range(end - self.batches_in_step, end)

    def release_batches(self) -> None:
        """Stop loading batches of other ranks."""
        self._data.release_batches()

    @property
    def batches_in_step(self) -> int:
        """The number of batches since the last optimizer step."""
        return self._data.position % self.micro_batches + 1

    def covering(self, share: float) -> AbstractContextManager[None]:
        """Return a context that keeps apart what is logged."""
        return self._logs.collecting(share)

    def counting_covered(self, scale: float) -> AbstractContextManager[None]:
        """Return a context that adds what was logged in :meth:`covering`."""
        return self._logs.counted(scale)

    def keep_logs(self) -> Callable[[], None]:
        """Return what undoes all that is logged from now on."""
        return private_logs.kept(self._trainer)

    def wrappers(self) -> list[DistributedDataParallel]:
        """Return the wrapper of the model."""
        wrapper = self._strategy.model
        return [wrapper] if isinstance(wrapper, DistributedDataParallel) else []

    def log(self, metrics: dict[str, float]) -> None:
        """Pass metrics to the Trainer's loggers."""
        for logger in self._trainer.loggers:
            logger.log_metrics(metrics, step=private.logger_step(self._trainer))

    def prepare_restart(self, is_whole: bool) -> None:
        """Save the logs, and the optimizer shards, which no other worker has."""
        for logger in self._trainer.loggers:
            logger.save()
        is_sharded = replacement.has_sharded_optimizer(self._trainer)
        if is_sharded or not is_whole:
            for callback in replacement.scar_checkpoints(self._trainer):
                callback.suspend(self._trainer, saves=is_whole)

    def own_state(self) -> dict[str, Any]:
        """Return the loops' place in the data, what was logged, and all random numbers."""
        return trainer_calls.own_state()

    def save_restart_state(self, more: dict[str, Any]) -> None:
        """Write the state of this call."""
        trainer_calls.save_restart_state(more)

    def release(self) -> None:
        """Finish pending saves of the checkpoint IO."""
        self._strategy.checkpoint_io.teardown()
