"""The private parts of Lightning that let a process take its place in a training that is under way.

As in :mod:`lightning_scar._lightning`, each has a test that fails loudly when Lightning changes.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only as utils_rank_zero_only
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.data import extract_batch_size
from torch.utils.data import DataLoader, IterableDataset

from lightning_scar import _lightning, logs
from lightning_scar.core.zero import is_sharded


def is_joiner(trainer: pl.Trainer) -> bool:
    """Whether this process is a replacement that has no state of the training yet."""
    return bool(getattr(trainer.strategy, "is_joiner", False))


def begin_as_joiner(trainer: pl.Trainer) -> None:
    """Lets a replacement run through its set-up without resuming, validating or logging anything.

    Until it is taken in it must not touch what the survivors write to.
    """
    _lightning.intercept_resume(trainer, lambda asked_for, weights_only: None)
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
    connector = trainer._logger_connector
    return {
        "seats": [callback.hand_over() for callback in successors(trainer)],
        "metrics": [connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics],
        "should_stop": trainer.should_stop,
    }


def take_state(trainer: pl.Trainer, checkpoint: dict[str, Any], live: dict[str, Any]) -> None:
    """Puts this process where the one was that the state comes from, in the middle of its loops.

    Args:
        trainer: In its first optimizer step.
        checkpoint: The other's checkpoint dict.
        live: Its :func:`live_state`.

    """
    connector = trainer._checkpoint_connector
    connector._loaded_checkpoint = checkpoint
    try:
        connector.restore_datamodule()
        connector.restore_model()
        connector.restore_callbacks()
        connector.restore_training_state()
    finally:
        connector._loaded_checkpoint = {}
    _forget_the_restart(trainer)
    metrics = trainer._logger_connector
    metrics._callback_metrics, metrics._logged_metrics, metrics._progress_bar_metrics = live["metrics"]
    trainer.should_stop = live["should_stop"]
    rank_zero_only.rank = utils_rank_zero_only.rank = trainer.global_rank  # type: ignore[attr-defined]
    logs.go_on(trainer)
    _show_progress(trainer)
    for callback, seat in zip(successors(trainer), live["seats"], strict=True):
        callback.take_over(trainer, seat)
    if trainer._results is not None:
        trainer._results.reset()


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
    connector = trainer._checkpoint_connector
    connector._loaded_checkpoint = checkpoint
    try:
        trainer.strategy.load_model_state_dict(checkpoint, strict=trainer.lightning_module.strict_loading)
        connector.restore_precision_plugin_state()
        connector.restore_optimizers()
    finally:
        connector._loaded_checkpoint = {}


def _forget_the_restart(trainer: pl.Trainer) -> None:
    """Loaded loops believe that they begin again; these are where they should be."""
    loop = trainer.fit_loop
    loop.restarting = False
    for each in (loop, loop.epoch_loop, loop.epoch_loop.automatic_optimization, loop.epoch_loop.val_loop):
        each._loaded_from_state_dict = each._resuming_from_checkpoint = False


def place_in_data(trainer: pl.Trainer) -> None:
    """Draws, or skips, the training data up to the batch that the loops count as the present one."""
    loop = trainer.fit_loop
    combined, fetcher = loop._combined_loader, loop._data_fetcher
    assert combined is not None
    assert fetcher is not None
    behind = loop.epoch_loop.batch_progress.current.ready
    for loader in combined.flattened:
        _set_sampler_epoch(loader, loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
    if fetcher.length is not None and len(combined.flattened) == 1 and _can_skip(combined.flattened[0]):
        with _skipping(combined.flattened[0], behind):
            iter(fetcher)
        fetcher.fetched = behind
        fetcher.done = behind >= fetcher.length
    else:
        iter(fetcher)
        for _ in range(behind):
            next(fetcher)


def _can_skip(loader: Any) -> bool:
    plain = type(loader) is DataLoader and loader.batch_sampler is not None
    return plain and not loader.persistent_workers and not isinstance(loader.dataset, IterableDataset)


@contextmanager
def _skipping(loader: "DataLoader[Any]", batches: int) -> Iterator[None]:
    """Makes the loader's next iterator begin later, without loading what is before."""
    sampler = loader.batch_sampler
    # A DataLoader forbids to set it; what has been iterated over keeps the one that it began with.
    vars(loader)["batch_sampler"] = _Rest(sampler, batches)
    try:
        yield
    finally:
        vars(loader)["batch_sampler"] = sampler


class _Rest:
    def __init__(self, sampler: Any, batches: int) -> None:
        self._sampler, self._batches = sampler, batches

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._sampler), self._batches, None)

    def __len__(self) -> int:
        return len(self._sampler)


def leaves_training_next(trainer: pl.Trainer) -> bool:
    """Whether, in an optimizer step that is done but not counted yet, something else than the next one follows."""
    loop = trainer.fit_loop.epoch_loop
    is_last = loop.max_steps != -1 and loop.global_step + 1 >= loop.max_steps
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return is_last or trainer.should_stop or loop._num_ready_batches_reached() or loop._should_check_val_fx(fetcher)


def undo_unfinished_step(checkpoint: dict[str, Any], accumulated: int) -> None:
    """Makes a checkpoint dict of the middle of a step one of the moment before it: nothing of it has counted.

    Args:
        checkpoint: The checkpoint dict, changed in place.
        accumulated: How many batches make a step; their gradients are in no checkpoint.

    """
    loop = checkpoint["loops"]["fit_loop"]
    batch = loop["epoch_loop.batch_progress"]
    done, ready = batch["current"]["processed"], batch["current"]["ready"]
    pending = 0 if batch["is_last_batch"] and done == ready else done % accumulated
    if done == ready and not pending:
        return
    batch["is_last_batch"] = False
    _set_back(batch, pending)
    _set_back(loop["epoch_loop.automatic_optimization.optim_progress"], 0)


def _set_back(progress: dict[str, Any], pending: int) -> None:
    """Makes all counters what has been done, less what must be done again."""
    for value in progress.values():
        if isinstance(value, dict):
            _set_back(value, pending)
    if "completed" in progress:
        done = progress.get("processed", progress["completed"]) - pending
        progress.update(dict.fromkeys(progress, done))


def compute_gradient(trainer: pl.Trainer, batch: Any) -> None:
    """Computes the gradient of a batch as a training step does, in place of the gradients that there are."""
    module = trainer.lightning_module
    module.zero_grad()
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
    loop = trainer.fit_loop.epoch_loop
    kwargs = loop._build_kwargs(OrderedDict(), batch, loop.batch_idx)
    with torch.enable_grad():
        output = call._call_strategy_hook(trainer, "training_step", *kwargs.values())
        loss = ClosureResult.from_training_step_output(output).closure_loss
        assert loss is not None
        call._call_strategy_hook(trainer, "backward", loss, trainer.optimizers[0])


def silence_sigterm_broadcast(trainer: pl.Trainer) -> None:
    """Ranks agree on the step to stop at over the supervisor's store.

    Lightning broadcasts before every batch, and takes an error there for no news: after a failure its ranks would be
    in different collectives.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def batch_size(trainer: pl.Trainer, batch: Any) -> int:
    """The number of samples in a batch, as Lightning's logging sees it; 1 if that cannot be told."""
    try:
        return extract_batch_size(batch)
    except (RecursionError, MisconfigurationException):
        return 1
