"""How a replacement takes its place in a training that is under way, and what it gets from a survivor."""

from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_only as utils_rank_zero_only
from lightning.pytorch.utilities import rank_zero_only

from lightning_scar.core.zero import is_sharded
from lightning_scar.lightning import loggers, private


def is_joiner(trainer: pl.Trainer) -> bool:
    """Whether this process is a replacement that has no state of the training yet."""
    return bool(getattr(trainer.strategy, "is_joiner", False))


def begin_as_joiner(trainer: pl.Trainer) -> None:
    """Lets a replacement run through its set-up without resuming, validating or logging anything.

    Until it is taken in it must not touch what the survivors write to.
    """
    private.intercept_resume(trainer, lambda asked_for, weights_only: None)
    trainer.num_sanity_val_steps = 0
    rank_zero_only.rank = utils_rank_zero_only.rank = trainer.world_size  # type: ignore[attr-defined]


class Successor(Protocol):
    """A callback that goes on in a replacement with more than its ``state_dict``."""

    def hand_over(self) -> Any:
        """What it needs there."""

    def take_over(self, trainer: pl.Trainer, seat: Any) -> None:
        """Goes on with what another rank's callback handed over."""

    def fence(self) -> None:
        """Something else than an optimizer is about to change the weights."""

    def save_all(self, trainer: pl.Trainer) -> None:
        """All workers will be started again: what this rank alone holds must be on disk."""

    def optimizer_states(self, trainer: pl.Trainer) -> list[Any]:
        """What is on disk of the states of sharded optimizers, each part from its freshest source. A collective."""


def successors(trainer: pl.Trainer) -> list[Successor]:
    """The callbacks of a trainer that are such, in order."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if hasattr(callback, "take_over")]


def has_sharded_optimizer(trainer: pl.Trainer) -> bool:
    """Whether each rank holds a part of an optimizer's state that no other one has."""
    return any(is_sharded(optimizer) for optimizer in trainer.optimizers)


def live_state(trainer: pl.Trainer) -> dict[str, Any]:
    """What a checkpoint does not hold, but a training that is under way needs."""
    return {
        "seats": [callback.hand_over() for callback in successors(trainer)],
        "metrics": private.metrics(trainer),
        "should_stop": trainer.should_stop,
    }


def take_state(trainer: pl.Trainer, checkpoint: dict[str, Any], live: dict[str, Any]) -> None:
    """Puts this process where the one was that the state comes from, in the middle of its loops.

    Args:
        trainer: In its first optimizer step.
        checkpoint: The other's checkpoint dict.
        live: Its :func:`live_state`.

    """
    private.restore(trainer, checkpoint)
    private.take_metrics(trainer, live["metrics"])
    trainer.should_stop = live["should_stop"]
    rank_zero_only.rank = utils_rank_zero_only.rank = trainer.global_rank  # type: ignore[attr-defined]
    loggers.go_on(trainer)
    _show_progress(trainer)
    for callback, seat in zip(successors(trainer), live["seats"], strict=True):
        callback.take_over(trainer, seat)
    private.reset_results(trainer)


def _show_progress(trainer: pl.Trainer) -> None:
    """A replacement begins with a hidden progress bar; the one of the first rank shows it where the dead one's was."""
    bar = trainer.progress_bar_callback
    if bar is not None and trainer.global_rank == 0:
        bar.enable()
        bar.on_train_start(trainer, trainer.lightning_module)
        bar.on_train_epoch_start(trainer, trainer.lightning_module)


def take_weights(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Takes what an optimizer step changes, and nothing else."""
    for callback in successors(trainer):
        callback.fence()
    private.restore_step(trainer, checkpoint)
