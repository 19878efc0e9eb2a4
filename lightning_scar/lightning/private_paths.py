"""The private API with which Lightning chooses paths of checkpoints. Each use is in one function here, with a test."""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

#: Seconds; file systems tell the time of a write no more exactly.
_GRAIN = 2.0


def select_paths(select: Callable[[pl.Trainer, Any, bool, Callable[[Any], Any]], Any]) -> None:
    """Let a function choose ``ckpt_path`` in every call of every Trainer, before any callback is set up.

    Args:
        select: Receives the trainer, the user's ``ckpt_path``, whether the call was given a model, and a function that
            returns Lightning's own choice for a ``ckpt_path``.

    """
    choose = _CheckpointConnector._select_ckpt_path

    def select_ckpt_path(
        connector: Any, state_fn: Any, ckpt_path: Any, model_provided: bool, model_connected: bool
    ) -> Any:
        def of_lightning(path: Any) -> Any:
            return choose(connector, state_fn, path, model_provided, model_connected)

        return select(connector.trainer, ckpt_path, model_provided, of_lightning)

    _CheckpointConnector._select_ckpt_path = select_ckpt_path  # type: ignore[method-assign,assignment]


def slurm_checkpoint(trainer: pl.Trainer) -> str | None:
    """Return the path that Lightning loads without being asked when it runs on SLURM; ``None`` if there is none."""
    return trainer._checkpoint_connector._hpc_resume_path if SLURMEnvironment.detect() else None


def overwrite_lost_files(trainer: pl.Trainer, since: float) -> None:
    """Let ModelCheckpoints overwrite what this run wrote before it died and has lost since; else ``-v1`` lies beside.

    Args:
        trainer: The trainer.
        since: When the state was saved that the run goes on from, in seconds since the epoch.

    """
    until = time.time()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint):
            exists = partial(_exists_and_counts, type(callback).file_exists, callback, since - _GRAIN, until)
            callback.file_exists = exists  # type: ignore[method-assign]


def _exists_and_counts(
    exists: Callable[..., bool],
    callback: ModelCheckpoint,
    since: float,
    until: float,
    filepath: Any,
    trainer: pl.Trainer,
) -> bool:
    if not exists(callback, filepath, trainer):
        return False
    is_lost = False
    # Some places do not know when a file was written.
    with suppress(NotImplementedError, OSError):
        is_lost = trainer.is_global_zero and since <= callback._fs.modified(filepath).timestamp() <= until
    return not trainer.strategy.broadcast(is_lost)
