"""The private parts of Lightning that this package leans on.

Each stands behind one function here, and each function has a test that fails loudly when Lightning changes.
"""

import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.migration.utils import _pl_migrate_checkpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_scar.core.zero import is_sharded, shard_state


def dump_checkpoint(trainer: pl.Trainer) -> dict[str, Any]:
    """Lightning's own checkpoint dict, with references to live tensors, and of a sharded optimizer this rank's shard.

    The public ``Trainer.save_checkpoint`` would write it, and end in a barrier. The strategy would gather the shards of
    a ``ZeroRedundancyOptimizer`` on one rank, a collective, and give the others nothing.
    """
    strategy = trainer.strategy
    optimizer_state = strategy.optimizer_state
    own = vars(strategy).get("optimizer_state")
    strategy.optimizer_state = (  # type: ignore[method-assign]
        lambda optimizer: shard_state(optimizer) if is_sharded(optimizer) else optimizer_state(optimizer)
    )
    try:
        return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    finally:
        vars(strategy).pop("optimizer_state")
        if own is not None:
            strategy.optimizer_state = own  # type: ignore[method-assign]


def intercept_resume(trainer: pl.Trainer, choose: Callable[[Any, bool | None], Any]) -> None:
    """Lets a callback's ``setup`` decide what the call under way resumes from.

    ``setup`` runs before the checkpoint is read, but does not learn which one was asked for.

    Args:
        trainer: The trainer whose ``fit``, ``validate``, ``test`` or ``predict`` is under way.
        choose: Gets the path that the user asked for, or ``None``, and ``weights_only``. Returns a checkpoint dict, or
            a path for Lightning to read, or ``None`` to begin anew.

    """
    connector = trainer._checkpoint_connector

    def resume_start(checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        end_interception(trainer)
        chosen = choose(checkpoint_path, weights_only)
        if isinstance(chosen, dict):
            connector._loaded_checkpoint = _pl_migrate_checkpoint(chosen)
        else:
            _resume_start(connector, chosen, weights_only)

    connector.resume_start = resume_start  # type: ignore[method-assign]


def _resume_start(connector: Any, path: Any, weights_only: bool | None) -> None:
    """Let Lightning read a checkpoint. Lightning 2.5 has no ``weights_only``, and loads everything."""
    knows = "weights_only" in inspect.signature(connector.resume_start).parameters
    connector.resume_start(path, **({"weights_only": weights_only} if knows else {}))


def end_interception(trainer: pl.Trainer) -> None:
    """Undoes :func:`intercept_resume`, if a call failed before it came to loading."""
    vars(trainer._checkpoint_connector).pop("resume_start", None)


def loader_states(checkpoint: dict[str, Any]) -> list[Any]:
    """What loaders with a ``state_dict`` said about their position in the data."""
    states: list[Any] = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
    return states


def take_loader_states(checkpoint: dict[str, Any], own: Any) -> None:
    """Puts the position in the data that a rank saved itself in the place of another rank's.

    Where a rank was stopped in the middle of a batch, its data are a batch ahead of those that only finished a step.
    All must go on with the same batch, or the one whose epoch ends first leaves the others waiting.

    Args:
        checkpoint: The checkpoint dict, changed in place.
        own: The dict as this rank saved it; ``None`` if it did not at that step.

    """
    if own is None or "loops" not in own:
        return
    loop, own_loop = checkpoint["loops"]["fit_loop"], own["loops"]["fit_loop"]
    epoch, own_epoch = (of["epoch_progress"]["current"]["ready"] for of in (loop, own_loop))
    batch, own_batch = (of["epoch_loop.batch_progress"]["current"]["ready"] for of in (loop, own_loop))
    if "combined_loader" in own_loop["state_dict"] and (epoch, batch) == (own_epoch, own_batch):
        loop["state_dict"]["combined_loader"] = own_loop["state_dict"]["combined_loader"]


def share_out_epoch(checkpoint: dict[str, Any], before: int, now: int) -> None:
    """Makes a checkpoint's position in its epoch that of another number of ranks, which have other shares of the data.

    The states of loaders are of no use then, and dropped.

    Args:
        checkpoint: The checkpoint dict, changed in place.
        before: The number of ranks that had come so far.
        now: The number of ranks that go on.

    """
    loop = checkpoint["loops"]["fit_loop"]
    loop["state_dict"].pop("combined_loader", None)
    progress = loop["epoch_loop.batch_progress"]
    current = progress["current"]
    done = current["processed"]
    # In the middle of the last batch, where an exception is saved, the epoch is not over yet.
    progress["is_last_batch"] &= done == current["ready"]
    # What is behind the end of the epoch for any number of ranks; else samples are rather seen twice than never.
    shared_out = (done + 1) * before if progress["is_last_batch"] else done * before // now
    completed = shared_out + current["completed"] - done
    progress["current"] = dict.fromkeys(current, shared_out) | {"completed": completed}


def place_data(trainer: pl.Trainer, states: list[Any], skip: bool = False) -> None:
    """Puts the training data where they were in the middle, or at the end, of an epoch.

    Lightning restores loaders before it tells their samplers the epoch, so the rest of a shuffled epoch would come in
    the order of epoch 0; and it takes an iterator at its end as it is, so an epoch would pass without a single batch.

    Args:
        trainer: Its loops are restored.
        states: From :func:`loader_states`.
        skip: Whether the states are of another number of ranks: what is behind is drawn once more and left aside.

    """
    loop = trainer.fit_loop
    if not loop.restarting or loop._combined_loader is None or loop._data_fetcher is None:
        return
    for loader in loop._combined_loader.flattened:
        _set_sampler_epoch(loader, loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
    # At an epoch's end, Lightning's own iterator has used the states up: the next one begins the next epoch.
    progress = loop.epoch_loop.batch_progress
    if not (progress.is_last_batch or skip):
        loop._combined_loader._load_state_dicts(states)
    iter(loop._data_fetcher)
    for _ in range(progress.current.ready) if skip and not progress.is_last_batch else ():
        next(loop._combined_loader)


def logger_step(trainer: pl.Trainer) -> int:
    """The step that Lightning gives its loggers; loggers want steps that never fall."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def mark_sigterm(trainer: pl.Trainer) -> None:
    """Makes the training loop end with ``SIGTERMException`` after the present batch."""
    trainer._signal_connector.received_sigterm = True


def time_is_up(trainer: pl.Trainer) -> bool:
    """Whether a Timer among the callbacks ends the training."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    return any((timer.time_remaining() or 1) <= 0 for timer in timers)


# -- a training that is under way ------------------------------------------------------------------------------------


def metrics(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Return the metrics that callbacks, loggers and the progress bar see."""
    connector = trainer._logger_connector
    return [connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics]


def take_metrics(trainer: pl.Trainer, values: list[dict[str, Any]]) -> None:
    """Take another rank's :func:`metrics`."""
    connector = trainer._logger_connector
    connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics = values


def reset_results(trainer: pl.Trainer) -> None:
    """Drop what has been logged in the present batch."""
    if trainer._results is not None:
        trainer._results.reset()


def restore(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Take everything that a checkpoint dict holds, in the middle of a loop."""
    with _loaded(trainer, checkpoint) as connector:
        connector.restore_datamodule()
        connector.restore_model()
        connector.restore_callbacks()
        connector.restore_training_state()
    _forget_the_restart(trainer)


def restore_step(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Take what an optimizer step changes, and nothing else."""
    with _loaded(trainer, checkpoint) as connector:
        trainer.strategy.load_model_state_dict(checkpoint, strict=trainer.lightning_module.strict_loading)
        connector.restore_precision_plugin_state()
        connector.restore_optimizers()


@contextmanager
def _loaded(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> Iterator[Any]:
    """Give Lightning's connector a checkpoint dict to restore from."""
    connector = trainer._checkpoint_connector
    connector._loaded_checkpoint = checkpoint
    try:
        yield connector
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
    in different collectives. Lightning 2.5 does not broadcast.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def batch_size(trainer: pl.Trainer, batch: Any) -> int:
    """The number of samples in a batch, as Lightning's logging sees it; 1 if that cannot be told."""
    try:
        return extract_batch_size(batch)
    except (RecursionError, MisconfigurationException):
        return 1
