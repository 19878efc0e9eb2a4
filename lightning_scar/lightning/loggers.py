"""The logs of a run, and its ``config.yaml``: what a process before this one has written is continued."""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from typing_extensions import override

from lightning_scar.core.stats import Stats
from lightning_scar.elastic.worker.state_folder import find, write
from lightning_scar.lightning import private

#: Where the versions are, for later processes of this job.
_FILE = "logs.json"


def share_versions(trainer: pl.Trainer) -> None:
    """Share the versions of the loggers with all ranks and with later processes of this job. A collective.

    Args:
        trainer: The trainer, after its loggers have started.

    """
    versions = trainer.strategy.broadcast([_version(logger) for logger in trainer.loggers])
    _set_versions(trainer, versions)
    if trainer.local_rank == 0:
        write(_FILE, lambda file: file.write(json.dumps(versions).encode()))


def reuse_versions(trainer: pl.Trainer) -> None:
    """Use the logger versions of an earlier process of this job, if there was one.

    Args:
        trainer: The trainer, before its loggers start.

    """
    path = find(_FILE)
    if path is None:
        return
    _set_versions(trainer, json.loads(path.read_text()))
    overwrite_config(trainer)


def overwrite_config(trainer: pl.Trainer) -> None:
    """Let LightningCLI overwrite ``config.yaml``, which this run itself has written when it started before."""
    for callback in _config_callbacks(trainer):
        callback.overwrite = True


def keep_config(trainer: pl.Trainer, checkpoints: list[Any]) -> None:
    """Let LightningCLI overwrite ``config.yaml`` if this run has started before.

    Args:
        trainer: The trainer, before anything is set up.
        checkpoints: Its :class:`~lightning_scar.SCARCheckpoint` callbacks.

    """
    if _config_callbacks(trainer) and not any(isinstance(each, _KeepsConfig) for each in trainer.callbacks):  # type: ignore[attr-defined]
        trainer.callbacks.insert(0, _KeepsConfig(checkpoints))  # type: ignore[attr-defined]


class _KeepsConfig(Callback):
    """Is set up before the callbacks that write the config, which fail if the file exists."""

    def __init__(self, checkpoints: list[Any]) -> None:
        self._checkpoints = checkpoints

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # A new list, because Lightning iterates over the present one.
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        goes_on = any(checkpoint.resumes and checkpoint.has_begun for checkpoint in self._checkpoints)
        # All ranks do what the first one does, because the callbacks ask it only if they must not overwrite.
        if trainer.strategy.broadcast(goes_on):
            overwrite_config(trainer)


def _config_callbacks(trainer: pl.Trainer) -> list[SaveConfigCallback]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, SaveConfigCallback)]


def log_stats(trainer: pl.Trainer, stats: Stats) -> None:
    """Pass the counters of a run to all loggers."""
    metrics = {f"scar/{name}": float(value) for name, value in vars(stats).items()}
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=private.logger_step(trainer))


def append_to_files(trainer: pl.Trainer) -> None:
    """Make loggers append to their files instead of replacing them, if this process is the one that logs.

    Args:
        trainer: The trainer, after its group was formed.

    """
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and logger._experiment is None and trainer.is_global_zero:
            with _nothing_deleted():
                writer: Any = logger.experiment
            path = Path(getattr(writer, "metrics_file_path", ""))
            if path.is_file():
                with path.open(newline="") as file:
                    writer.metrics_keys = next(csv.reader(file), [])


def _version(logger: Any) -> Any:
    # For other loggers, e.g. of web services, the version is an ID that only they can reuse.
    return logger.version if hasattr(logger, "_version") else None


def _set_versions(trainer: pl.Trainer, versions: list[Any]) -> None:
    for logger, version in zip(trainer.loggers, versions, strict=True):
        if version is not None:
            logger._version = version  # type: ignore[attr-defined]


@contextmanager
def _nothing_deleted() -> Iterator[None]:
    check = _ExperimentWriter._check_log_dir_exists
    _ExperimentWriter._check_log_dir_exists = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        _ExperimentWriter._check_log_dir_exists = check  # type: ignore[method-assign]
