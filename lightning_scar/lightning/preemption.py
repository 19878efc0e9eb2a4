"""The end of a Trainer's call when the process is told to end: behind a batch, never in a signal handler."""

import signal
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from typing_extensions import override

from lightning_scar.core.bases import Seen
from lightning_scar.core.signals import DeferredSignals, stop_signals
from lightning_scar.lightning import private, private_signals, replacement


def exit_code(signum: int) -> int:
    """Return the exit code that a shell gives for a signal."""
    return 128 + signum


class _TrainerSignals(DeferredSignals):
    """Replaces Lightning's own handlers: the collective in one hangs if ranks were interrupted at different points.

    Attributes:
        has_saved: Whether a rank that waits for the end of rank 0 has saved once on the signal.

    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self.has_saved = False
        numbers = set(stop_signals())
        requeue = private_signals.requeue_signal(trainer)
        super().__init__(numbers | {requeue} if numbers and requeue is not None else numbers)

    @override
    def _note(self, signum: int, frame: FrameType | None) -> None:
        is_first, strategy = self.received is None, self._trainer.strategy
        # A supervisor decides for all workers; each learns from it that the job ends.
        is_supervised = getattr(strategy, "is_supervised", False)
        if not is_supervised:
            super()._note(signum, frame)
        # Ctrl-C reaches the processes of Lightning's launcher by itself, and would interrupt them if it came again.
        if is_first and strategy.launcher is not None and (is_supervised or signum != signal.SIGINT):
            strategy.launcher.kill(signum)

    @override
    def proceed(self) -> None:
        """Let the program end, too, if the job ends and this call has ended by itself."""
        if self.received is None and getattr(self._trainer.strategy, "is_stopping", False):
            self.received = signal.SIGTERM
        super().proceed()

    @override
    def _insist(self) -> None:
        # Lightning would turn a KeyboardInterrupt into exit code 1.
        raise SIGTERMException(exit_code(signal.SIGINT))


@dataclass
class Preemption(Callback):
    """Records signals in all calls of a Trainer, and ends them at the next batch of a validation or test.

    In the training :class:`~lightning_scar.SCARCheckpoint` asks for them behind every step. This callback is one of the
    first, so that a validation ends before anything swaps the weights, or else when they are swapped back.

    Attributes:
        is_updating: Whether an optimizer may have changed some of the parameters, but not all.

    """

    is_updating: bool = field(default=False, init=False)
    _requeued: bool = field(default=False, init=False, repr=False)
    _signals: _TrainerSignals | None = field(default=None, init=False, repr=False, compare=False)
    _weights: list[tuple[Tensor, Seen]] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, trainer: pl.Trainer) -> "Preemption":
        """Return the one of a trainer, which gets it if it has none."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found = next((callback for callback in callbacks if isinstance(callback, cls)), None)
        if found is None:
            found = cls()
            # A new list, because Lightning may be iterating over the present one.
            trainer.callbacks = [found, *callbacks]  # type: ignore[attr-defined]
        return found

    @property
    def received(self) -> int | None:
        """The signal that was received, and that nothing was done about yet."""
        return self._signals.received if self._signals is not None else None

    # -- behind a training step ----------------------------------------------------------------------------------

    def proceed(self, trainer: pl.Trainer) -> None:
        """Do what the signal asks for, after the save that it asks for: end the training loop after this batch.

        With several ranks, only rank 0 ends its loop, and the others follow when they miss it. The other ranks only
        save on the signal, and behind the next step again, which is the last one if rank 0 was told a step later.
        SLURM's signal lets rank 0 requeue the job once.
        """
        assert self._signals is not None
        signum = self._signals.received
        assert signum is not None
        if signum == private_signals.requeue_signal(trainer):
            self._signals.received = None
            if not self._requeued:
                self._requeued = True
                private_signals.requeue(trainer, signum)
            return
        if not trainer.is_global_zero:
            if self._signals.has_saved:
                self._signals.received = None
            self._signals.has_saved = not self._signals.has_saved
            return
        previous = self._signals.previous.get(signum)
        if trainer.world_size == 1 and signum == signal.SIGTERM and callable(previous):
            previous(signum, None)
        private.mark_sigterm(trainer)

    def stop(self, trainer: pl.Trainer, signum: int) -> None:
        """Do the same at the end of the training, which ends the call at once."""
        self.proceed(trainer)
        raise SIGTERMException(exit_code(signum))

    # -- elsewhere -----------------------------------------------------------------------------------------------

    def saves(self, trainer: pl.Trainer, error: BaseException, on_exception: bool) -> bool:
        """Return whether an exception brings a save: of the state after a step, in the training or in a validation.

        Args:
            trainer: The trainer.
            error: The exception.
            on_exception: Whether other exceptions than a scheduler's signal bring one.

        """
        if not isinstance(error, SIGTERMException):
            return on_exception and trainer.training
        if error.code == exit_code(signal.SIGINT) and not on_exception:
            return False
        in_validation = trainer.validating and trainer.state.fn == TrainerFn.FITTING
        return (trainer.training and not self.is_updating) or (in_validation and self._is_as_trained())

    def _install(self, trainer: pl.Trainer) -> None:
        if self._signals is None:
            self._signals = _TrainerSignals(trainer)

    def _poll(self, trainer: pl.Trainer) -> None:
        """Raise the exception that ends the call, if the process was told to end."""
        signum = self.received
        if signum is None and getattr(trainer.strategy, "is_stopping", False):
            signum = signal.SIGTERM
        if signum is not None and signum != private_signals.requeue_signal(trainer) and self._is_as_trained():
            raise SIGTERMException(exit_code(signum))

    def _is_as_trained(self) -> bool:
        """Return whether the weights are those that the validation began with, in whatever way they were swapped."""
        return not any(seen.differs(tensor) for tensor, seen in self._weights)

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._install(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._weights = []
        self._install(trainer)
        self._poll(trainer)

    @override
    def on_before_optimizer_step(self, *args: Any) -> None:
        self.is_updating = True

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self.is_updating = False

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._install(trainer)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._poll(trainer)
            self._weights = [(tensor, Seen.of(tensor)) for tensor in map(Tensor.detach, pl_module.parameters())]

    @override
    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._poll(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._poll(trainer)
        self._weights = []

    @override
    def on_test_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._install(trainer)

    @override
    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._poll(trainer)

    @override
    def on_predict_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._install(trainer)

    @override
    def on_predict_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._poll(trainer)

    # -- the end of a call ---------------------------------------------------------------------------------------

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give Lightning's own exception the exit code of the signal; it would be 0."""
        if isinstance(exception, SIGTERMException) and exception.code is None:
            exception.code = exit_code(self.received or signal.SIGTERM)
        # Lightning removes all handlers when it is done.
        self._signals = None

    @override
    def on_fit_end(self, *args: Any) -> None:
        """Defer signals until the last save is written; Lightning has removed the handlers."""
        if self._signals is not None:
            self._signals.install()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End, unless a running checkpoint is still written: then its callback does that."""
        if not replacement.scar_checkpoints(trainer):
            self.end()

    def end(self) -> None:
        """Let a signal that came too late for the call do what it does by default."""
        signals, self._signals = self._signals, None
        if signals is not None:
            signals.proceed()
