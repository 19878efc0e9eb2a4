"""Which checkpoint a call of a Trainer means, where the user names none or says ``ckpt_path="last"``."""

import os
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import fsspec
import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_scar.lightning import loggers, private_paths, replacement

#: The path that Lightning has chosen for the present call of a Trainer, because it runs on SLURM.
_chosen_on_slurm: WeakKeyDictionary[pl.Trainer, str] = WeakKeyDictionary()


def select(trainer: pl.Trainer, asked_for: Any, is_model_given: bool, choose: Callable[[Any], Any]) -> Any:
    """Choose ``ckpt_path`` before anything is set up.

    Args:
        trainer: The trainer.
        asked_for: The user's ``ckpt_path``.
        is_model_given: Whether the call was given a model.
        choose: Lightning's own choice for a ``ckpt_path``.

    Returns:
        What to load; ``None`` for nothing, or for what a callback's ``setup`` decides.

    """
    _chosen_on_slurm.pop(trainer, None)
    ours = replacement.scar_checkpoints(trainer)
    is_fit = trainer.state.fn == TrainerFn.FITTING
    if is_fit and ours:
        loggers.keep_config(trainer, ours)
    if asked_for == "last" and (paths := [callback.best_model_path for callback in ours if callback.best_model_path]):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"(?s).*there is no last checkpoint available")
            chosen = choose(asked_for)
        is_automatic = is_fit and any(callback.resumes for callback in ours)
        return chosen if chosen or is_automatic else paths[0]
    chosen = choose(asked_for)
    if not ours or asked_for is not None or chosen is None or chosen != private_paths.slurm_checkpoint(trainer):
        return chosen
    if is_fit:
        _chosen_on_slurm[trainer] = chosen
    elif _is_as_new_in_memory(trainer, chosen):
        return None if is_model_given else choose("best")
    return chosen


def is_chosen_on_slurm(trainer: pl.Trainer, path: Any) -> bool:
    """Return whether nobody has asked for a path: Lightning has chosen it, because it runs on SLURM."""
    return path is not None and bool(_chosen_on_slurm.get(trainer) == path)


def step_of(path: str, weights_only: bool | None = None) -> int:
    """Return the step of one of Lightning's own checkpoint files, without reading its tensors if it is local.

    Args:
        path: The path of the file, or its URL.
        weights_only: As in ``torch.load``.

    """
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": weights_only}
    if os.path.exists(path):
        checkpoint = torch.load(path, mmap=True, **options)
    else:
        with fsspec.open(path, "rb") as file:
            checkpoint = torch.load(file, **options)
    return int(checkpoint["global_step"])


def _is_as_new_in_memory(trainer: pl.Trainer, path: str) -> bool:
    trained: int = trainer.global_step
    try:
        return step_of(path) <= trained
    except Exception:
        return False  # Lightning will read it, and say what is wrong.


private_paths.select_paths(select)
