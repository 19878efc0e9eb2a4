"""The logs of a training go on in the process that takes the place of the one that wrote them."""

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


def note(trainer: pl.Trainer) -> None:
    """Tells every later process of this job where the present one logs to. A collective.

    Args:
        trainer: Whose loggers have begun.

    """
    versions = trainer.strategy.broadcast([_version(logger) for logger in trainer.loggers])
    _take(trainer, versions)
    if trainer.local_rank == 0:
        partial = _path().with_suffix(".partial")
        partial.write_text(json.dumps(versions))
        partial.replace(_path())


def inherit(trainer: pl.Trainer) -> None:
    """Takes over the places that an earlier process of this job logged to, if there was one.

    Args:
        trainer: Before its loggers begin.

    """
    if not _path().exists():
        return
    _take(trainer, json.loads(_path().read_text()))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            # The file that it would refuse to write over is its own.
            callback.overwrite = True


def go_on(trainer: pl.Trainer) -> None:
    """Makes loggers that would begin a file anew add to what is there, if this process is the one that logs.

    Args:
        trainer: In a group that has been formed.

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
    # Of others, e.g. those of web services, the version is an identity that only they can take up again.
    return logger.version if hasattr(logger, "_version") else None


def _take(trainer: pl.Trainer, versions: list[Any]) -> None:
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
