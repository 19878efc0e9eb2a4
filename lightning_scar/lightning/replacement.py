"""How a replacement joins a running training, and what it receives from a survivor."""

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_only as utils_rank_zero_only
from lightning.pytorch.utilities import rank_zero_only

from lightning_scar.core.zero import is_sharded
from lightning_scar.lightning import loggers, private
from lightning_scar.lightning.private_loops import present_metrics
from lightning_scar.lightning.results import join_results, logged, results


def is_joiner(trainer: pl.Trainer) -> bool:
    """Return whether this process is a replacement that has not joined yet."""
    return bool(getattr(trainer.strategy, "is_joiner", False))


def prepare_joiner(trainer: pl.Trainer) -> None:
    """Let a replacement run its set-up without resuming, validating or logging.

    Until it joins, it must not write to the survivors' files.
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
    """Return whether each rank holds a shard of an optimizer's state."""
    return any(is_sharded(optimizer) for optimizer in trainer.optimizers)


def live_state(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what another process needs beside the checkpoint dict."""
    return {
        "weights": private.weights_beside(trainer, checkpoint),
        "tickets": [callback.hand_over() for callback in scar_checkpoints(trainer)],
        "metrics": present_metrics(trainer),
        "results": results(trainer),
        "logged": logged(trainer),
        "should_stop": trainer.should_stop,
    }


def load_state(trainer: pl.Trainer, checkpoint: dict[str, Any], live: dict[str, Any]) -> None:
    """Load another process's state, in the middle of its loops.

    Args:
        trainer: The trainer, in its first optimizer step.
        checkpoint: The other process's checkpoint dict.
        live: The other process's :func:`live_state`.

    """
    private.restore(trainer, checkpoint)
    private.set_metrics(trainer, live["metrics"])
    trainer.should_stop = live["should_stop"]
    rank_zero_only.rank = utils_rank_zero_only.rank = trainer.global_rank  # type: ignore[attr-defined]
    loggers.append_to_files(trainer)
    _show_progress(trainer)
    for callback, ticket in zip(scar_checkpoints(trainer), live["tickets"], strict=True):
        callback.take_over(trainer, ticket)
    join_results(trainer, live["results"], live["logged"])


def _show_progress(trainer: pl.Trainer) -> None:
    """Show the progress bar if this replacement is rank 0; it was hidden during set-up."""
    bar = trainer.progress_bar_callback
    if bar is not None and trainer.global_rank == 0:
        bar.enable()
        bar.on_train_start(trainer, trainer.lightning_module)
        bar.on_train_epoch_start(trainer, trainer.lightning_module)


def load_weights(trainer: pl.Trainer, checkpoint: dict[str, Any], live: dict[str, Any]) -> None:
    """Load only what an optimizer step changes."""
    weights = checkpoint["state_dict"] if live["weights"] is None else live["weights"]
    for callback in scar_checkpoints(trainer):
        callback.fence()
    private.restore_step(trainer, {**checkpoint, "state_dict": weights})
