"""The private parts of Lightning that this package leans on.

Each stands behind one function here, and each function has a test that fails loudly when Lightning changes.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.migration.utils import _pl_migrate_checkpoint

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
            # Lightning 2.5 does not know the other argument.
            connector.resume_start(chosen, **({} if weights_only is None else {"weights_only": weights_only}))

    connector.resume_start = resume_start  # type: ignore[method-assign]


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
