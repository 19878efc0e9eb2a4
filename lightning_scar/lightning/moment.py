"""The moment of a checkpoint: what was left to do, and the metrics and random numbers that it goes on with."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_scar.core.random_generators import kept_generators, random_generators, set_random_generators
from lightning_scar.lightning import private, private_loops, progress
from lightning_scar.lightning.private_paths import overwrite_lost_files
from lightning_scar.lightning.progress import KEY, Pending
from lightning_scar.lightning.results import results, set_results


class Beginnings(Callback):
    """Keeps what callbacks and logged metrics were when the present validation, or the end of the epoch, began.

    If an error ends the training there, or in the hooks at the start of an epoch, that begins again. It also keeps the
    random numbers with which a batch begins again, or the validation behind it: those at the end of the last step.
    """

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}
        self.results: list[dict[str, Any]] = []
        self.time = time.time()
        self.random: Callable[[], dict[str, Any]] = random_generators

    def keep_random(self) -> None:
        """Let what an error ends from now on begin again with the present random numbers."""
        self.random = kept_generators()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note the beginning; the other callbacks' hooks follow."""
        self._note(trainer)
        self.keep_random()

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the random numbers of the first batch: its loader has begun since the epoch did."""
        if batch_idx == 0:
            self.keep_random()

    @override
    def on_validation_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note the beginning; the other callbacks' hooks follow."""
        self._note(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note the beginning; the other callbacks' hooks follow."""
        self._note(trainer)
        self.keep_random()

    def _note(self, trainer: pl.Trainer) -> None:
        private_loops.begins(trainer)
        self.time = time.time()
        self.states, self.results = private_loops.callback_states(trainer), results(trainer)

    @classmethod
    def of(cls, trainer: pl.Trainer) -> "Beginnings":
        """Return the one among the trainer's callbacks; an empty one if there is none."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return next((callback for callback in callbacks if isinstance(callback, cls)), Beginnings())


def keep_random(trainer: pl.Trainer) -> None:
    """Keep the random numbers at the end of a batch, unless its gradients are still accumulated."""
    if not private_loops.accumulates(trainer):
        Beginnings.of(trainer).keep_random()


def dump(trainer: pl.Trainer, pending: Pending | None = None) -> dict[str, Any]:
    """Return Lightning's checkpoint dict with the moment, and with references to live tensors.

    Args:
        trainer: The trainer.
        pending: What is left to do; by default what the loops tell. Then the dict, which may be from the middle of
            anything, is set back to where a training can continue from.

    """
    checkpoint = private.dump_checkpoint(trainer)
    logged, random, since = results(trainer), random_generators, time.time()
    if pending is None:
        pending = private_loops.pending(trainer)
        beginnings = Beginnings.of(trainer)
        begins = trainer.validating or private_loops.begins_epoch(trainer)
        if not private_loops.is_between_epochs(trainer):
            progress.undo_unfinished_step(checkpoint, trainer.accumulate_grad_batches)
            random = beginnings.random
        elif pending == "epoch end" or private_loops.ended_within_epoch(trainer):
            # In the first case its end is made again, in the second a run with higher limits may go on within it.
            progress.reopen_epoch(checkpoint)
            logged, begins = beginnings.results, begins or pending == "epoch end"
        if begins:
            checkpoint.get("callbacks", {}).update(beginnings.states)
            random, since = beginnings.random, beginnings.time
    checkpoint[KEY] = {
        "pending": pending,
        "time": since,
        "metrics": private_loops.present_metrics(trainer),
        "results": logged,
        "random": random(),
    }
    return checkpoint


class Moment:
    """The moment of the checkpoint that a ``fit`` resumes from.

    Args:
        trainer: The trainer, which is about to restore the checkpoint.
        checkpoint: The checkpoint dict; its counters are brought to the boundary of a batch.
        own: The dict as this rank saved it at the same step; ``None`` if it did not.

    """

    def __init__(self, trainer: pl.Trainer, checkpoint: dict[str, Any], own: Any = None) -> None:
        saved = checkpoint.get(KEY, {})
        # Each rank has metrics and random numbers of its own.
        self._saved = own.get(KEY, saved) if own is not None else {**saved, "random": None}
        self.pending = progress.settle(checkpoint)
        checkpoint.pop(KEY, None)
        self._trainer = trainer
        if self.pending != "nothing":
            private_loops.let_the_last_step_end(trainer)

    def go_on(self) -> None:
        """Go on from it in ``on_train_start``, as the last thing before the first batch."""
        set_random = partial(set_random_generators, self._saved.get("random") or {})
        if "metrics" in self._saved:
            private.set_metrics(self._trainer, self._saved["metrics"])
            set_results(self._trainer, self._saved["results"])
        if "time" in self._saved:
            overwrite_lost_files(self._trainer, since=self._saved["time"])
        private_loops.go_on(self._trainer, self.pending, set_random)
        Beginnings.of(self._trainer).keep_random()
