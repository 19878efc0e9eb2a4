"""The private API of Lightning that collects what a LightningModule logs.

Each use is in one function here, and each function has a test that fails when Lightning changes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor


@contextmanager
def apart(trainer: pl.Trainer) -> Iterator[dict[str, Any]]:
    """Keep what is logged in this context apart from what was logged in the epoch. Yield where it is."""
    loop = trainer.fit_loop.epoch_loop
    own, loop._results = loop._results, _ResultCollection(training=True)
    try:
        yield loop._results
    finally:
        loop._results = own


def kept(trainer: pl.Trainer) -> Callable[[], None]:
    """Return what undoes all that is logged from now on, but for metric objects."""
    results = trainer.fit_loop.epoch_loop._results
    # Lightning replaces these values, and changes none in place.
    before = {key: {name: getattr(metric, name) for name in _values(metric)} for key, metric in results.items()}

    def undo() -> None:
        for key, metric in list(results.items()):
            if key in before:
                vars(metric).update(before[key])
            else:
                del results[key]

    return undo


def _values(metric: Any) -> list[str]:
    return ["has_reset", *(metric._defaults if metric.is_tensor else ())]


@contextmanager
def of_batch(trainer: pl.Trainer, batch: Any) -> Iterator[None]:
    """Take the size of another batch than the loop's for what is logged in this context."""
    results = trainer.fit_loop.epoch_loop._results
    own = results.batch, results.batch_size
    results.batch, results.batch_size = batch, None
    try:
        yield
    finally:
        results.batch, results.batch_size = own


@contextmanager
def before_sync(trainer: pl.Trainer, change: Callable[[str, str, Tensor], Tensor]) -> Iterator[None]:
    """Change the values that are logged with ``sync_dist=True`` for a step, before the workers reduce them.

    Args:
        trainer: The trainer.
        change: Given the key of a metric, its :func:`reduction` and this worker's value, returns another value.

    """
    with ExitStack() as stack:
        for key, metric in trainer.fit_loop.epoch_loop._results.items():
            if metric.is_tensor and metric.meta.on_step and metric.meta.sync.should:
                sync = metric.meta.sync
                sync._fn = partial(_reduced, partial(change, key, reduction(metric)), sync._fn)
                stack.callback(_reset_sync, metric)
        yield


def _reset_sync(metric: Any) -> None:
    # The setter makes `_fn` anew. Meanwhile, Lightning has copied `sync`.
    metric.meta.sync.should = metric.meta.sync.should


def _reduced(change: Callable[[Tensor], Tensor], reduce: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    return reduce(change(value))


def step_value(metric: Any) -> Tensor | None:
    """Return what was logged last for a step; ``None`` if it is for epochs only, or a metric object."""
    return metric._forward_cache if metric.is_tensor and metric.meta.on_step else None


def reduction(metric: Any) -> str:
    """Return how a metric's values are reduced: ``"mean"``, ``"sum"``, ``"max"`` or ``"min"``."""
    return str(metric.meta.reduce_fx.__name__)


def add_to_epoch(trainer: pl.Trainer, key: str, metric: Any, share: float) -> None:
    """Add what was logged :func:`apart` to what the epoch has.

    Args:
        trainer: The trainer.
        key: The metric's key.
        metric: The metric.
        share: The share of a whole batch that it was computed of.

    """
    own = trainer.fit_loop.epoch_loop._results.get(key)
    if own is None or not own.is_tensor or not own.meta.on_epoch:
        return
    match reduction(own):
        case "mean":
            own.value = own.value + metric.value
            own.cumulated_batch_size = own.cumulated_batch_size + metric.cumulated_batch_size
        case "sum":
            own.value = own.value + metric.value * share
        case _:
            own.value = own.meta.reduce_fx(own.value, metric.value)
