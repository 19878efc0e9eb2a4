"""The private API with which Lightning chooses ``ckpt_path``. Each use is in one function here, with a test."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector


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
