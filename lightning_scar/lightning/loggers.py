"""Lets a replacement continue the logs of the process that it replaces."""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from lightning_scar.elastic.worker.state_folder import state_folder


def share_versions(trainer: pl.Trainer) -> None:
    """Share the versions of the loggers with all ranks and with later processes of this job. A collective.

    Args:
        trainer: The trainer, after its loggers have started.

    """
    versions = trainer.strategy.broadcast([_version(logger) for logger in trainer.loggers])
    _set_versions(trainer, versions)
    if trainer.local_rank == 0:
        partial = _path().with_suffix(".partial")
        partial.write_text(json.dumps(versions))
        partial.replace(_path())


def reuse_versions(trainer: pl.Trainer) -> None:
    """Use the logger versions of an earlier process of this job, if there was one.

    Args:
        trainer: The trainer, before its loggers start.

    """
    if not _path().exists():
        return
    _set_versions(trainer, json.loads(_path().read_text()))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            # The file exists, because an earlier process of this job wrote it.
            callback.overwrite = True


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


def _path() -> Path:
    return state_folder() / "logs.json"


@contextmanager
def _nothing_deleted() -> Iterator[None]:
    check = _ExperimentWriter._check_log_dir_exists
    _ExperimentWriter._check_log_dir_exists = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        _ExperimentWriter._check_log_dir_exists = check  # type: ignore[method-assign]
