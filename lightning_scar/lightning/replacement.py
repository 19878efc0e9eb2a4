"""How a replacement takes its place in a training that is under way, and what it gets from a survivor."""

from typing import Any

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


def scar_checkpoints(trainer: pl.Trainer) -> list[Any]:
    """Return the trainer's :class:`~lightning_scar.SCARCheckpoint` callbacks, in order."""
    # Known by a method, because their module imports this one.
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if hasattr(callback, "take_over")]


def has_sharded_optimizer(trainer: pl.Trainer) -> bool:
    """Whether each rank holds a part of an optimizer's state that no other one has."""
    return any(is_sharded(optimizer) for optimizer in trainer.optimizers)


def live_state(trainer: pl.Trainer) -> dict[str, Any]:
    """What a checkpoint does not hold, but a training that is under way needs."""
    return {
        "seats": [callback.hand_over() for callback in scar_checkpoints(trainer)],
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
    for callback, seat in zip(scar_checkpoints(trainer), live["seats"], strict=True):
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
    for callback in scar_checkpoints(trainer):
        callback.fence()
    private.restore_step(trainer, checkpoint)
