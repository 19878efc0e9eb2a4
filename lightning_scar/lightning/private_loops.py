"""The private API of Lightning's loops that a resumed ``fit`` uses, so that it does what was left to do.

Lightning guesses that from the counters of its loops. Each use is in one function here, with a test.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.trainer import call

from lightning_scar.core.skeleton import heavy
from lightning_scar.lightning import private
from lightning_scar.lightning.progress import Pending

#: What is added to the state that Lightning saves of its training loop: the orders of its loaders.
ORDERS = "orders"
#: What was left to do when the fit resumed, and after how many batches.
_LEFT = "lightning_scar_left"
#: What is called when that begins.
_ACTIONS = "lightning_scar_actions"


def pending(trainer: pl.Trainer) -> Pending:
    """Return what is left to do when an error ends ``fit``.

    In the hooks at the end of an epoch that is ``"epoch end"``, but their epoch already counts as processed.
    """
    loop = trainer.fit_loop
    epoch: Any = loop.epoch_progress.current
    batch: Any = loop.epoch_loop.batch_progress.current
    left, ready = vars(loop.epoch_loop).get(_LEFT, ("nothing", -1))
    if loop.epoch_loop.restarting and batch.ready == ready:
        return cast(Pending, left)  # It has not been done yet.
    if epoch.processed >= epoch.started:
        return "epoch end" if epoch.completed < epoch.processed else "nothing"
    if trainer.validating or batch.completed < batch.processed == batch.ready:
        return "batch end"
    return "epoch end" if batch.processed == batch.ready and loop.epoch_loop._num_ready_batches_reached() else "nothing"


def is_between_epochs(trainer: pl.Trainer) -> bool:
    """Return whether the present epoch counts as processed."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    return bool(epoch.processed >= epoch.started)


def ended_within_epoch(trainer: pl.Trainer) -> bool:
    """Return whether a limit of steps or of time has ended the last epoch, which counts as processed, in its middle."""
    loop = trainer.fit_loop.epoch_loop
    is_within = bool(loop.batch_progress.current.ready) and not loop._num_ready_batches_reached()
    return is_within and not begins_epoch(trainer)


def begins_epoch(trainer: pl.Trainer) -> bool:
    """Return whether the hooks at the start of an epoch are running."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    return bool(epoch.ready > epoch.started)


def accumulates(trainer: pl.Trainer) -> bool:
    """Return whether the gradients of the present batch are accumulated with those of the next one."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def callback_states(trainer: pl.Trainer) -> dict[str, Any]:
    """Return copies of the states of callbacks, as in a checkpoint dict, but not of large ones: averaged weights."""
    states = call._call_callbacks_state_dict(trainer)
    return {key: copy.deepcopy(state) for key, state in states.items() if not any(heavy(state))}


def present_metrics(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Return the metrics of callbacks, loggers and the progress bar, those of the present batch included.

    Between two epochs, asking for them might run collectives, so then it returns those that Lightning has noted.
    """
    connector = trainer._logger_connector
    if trainer.training and connector._first_loop_iter is not None:
        _ = connector.callback_metrics, connector.logged_metrics, connector.progress_bar_metrics
    return [copy.copy(each) for each in private.metrics(trainer)]


def let_the_last_step_end(trainer: pl.Trainer) -> None:
    """Let a ``fit`` that resumes at ``max_steps`` do what follows the last step, instead of returning at once.

    Args:
        trainer: The trainer, which is about to restore its loops.

    """
    # Not before the schedules are made, which may depend on the limit.
    trainer._checkpoint_connector.resume_end = partial(_resume_end, trainer)  # type: ignore[method-assign]


# Functions of this module, because a Trainer may be pickled at any moment.
def _resume_end(trainer: pl.Trainer) -> None:
    connector, loop = trainer._checkpoint_connector, trainer.fit_loop.epoch_loop
    del connector.resume_end
    connector.resume_end()
    limit = loop.max_steps
    if 0 <= limit <= loop.global_step:
        loop.max_steps = loop.global_step + 1
        _when_it_begins(loop, partial(setattr, loop, "max_steps", limit))


def _when_it_begins(loop: Any, action: Callable[[], None]) -> None:
    """Call something when what was left to do begins: a validation, or the end of an epoch."""
    vars(loop).setdefault(_ACTIONS, []).append(action)


def begins(trainer: pl.Trainer) -> None:
    """Note that a validation or the end of an epoch begins."""
    loop: Any = trainer.fit_loop.epoch_loop
    for action in vars(loop).pop(_ACTIONS, []):
        action()


def go_on(trainer: pl.Trainer, pending: Pending, set_random: Callable[[], None]) -> None:
    """Let a resumed ``fit`` do what was left to do, instead of what Lightning guesses from its counters.

    Args:
        trainer: The trainer, in ``on_train_start``. The counters of its loops are at the boundary of a batch.
        pending: What was left to do.
        set_random: Sets the random generators; called when the undisturbed run would have drawn the next number.

    """
    fit, fetcher = trainer.fit_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    loop: Any = fit.epoch_loop
    set_random()
    vars(loop)[_LEFT] = pending, loop.batch_progress.current.ready
    # Else the first epoch would not update ReduceLROnPlateau. Not the property, which is passed on to the inner loops.
    fit._restarting = False
    batch = loop.batch_progress
    if not batch.current.ready or is_between_epochs(trainer):
        # So Lightning begins an epoch, and if it is another one than that of the checkpoint, with a new iterator.
        loop.restarting = False
        if is_between_epochs(trainer):
            fit._resuming_from_checkpoint = False
        return
    # Else the first batch would discard what the epoch has logged so far.
    trainer._logger_connector._first_loop_iter = False
    is_over = loop._num_ready_batches_reached() or _ACTIONS in vars(loop)
    if loop._num_ready_batches_reached() and trainer.num_training_batches != float("inf"):
        # Another number of ranks may have ended it.
        batch.current.__dict__.update(dict.fromkeys(vars(batch.current), int(trainer.num_training_batches)))
    if pending == "batch end" and loop._should_check_val_fx(fetcher):
        # So Lightning goes on behind the batch, where it validates.
        loop._restart_stage = "restarted_on_last"
        loop.val_loop._restart_stage = "restarted_mid_evaluation"
        loop.val_loop.restarting = False
        return
    steps = not accumulates(trainer)
    if pending == "batch end":
        loop.update_lr_schedulers("step", update_plateau_schedulers=True)
        loop._batches_that_stepped += steps
    # Lightning counts both in `reset`.
    loop._batches_that_stepped -= steps
    if is_over:
        loop._restart_stage = "none"
        # Lightning ends the epoch, but may make an iterator for a validation before.
        _when_it_begins(loop, set_random)
        fetcher.done = True
        getattr(fetcher, "batches", []).clear()
        return
    loop._restart_stage = "restarted_on_train_batch_end"
    batch.total.completed -= 1
    batch.current.completed -= 1
    loop._on_before_fetch = partial(_before_fetch, loop, set_random, vars(loop).get("_on_before_fetch"))


def _before_fetch(loop: Any, action: Callable[[], None], present: Callable[[], None] | None) -> None:
    """Call something when the loop is about to fetch its next batch, once."""
    action()
    del loop._on_before_fetch
    if present is not None:
        loop._on_before_fetch = present
    loop.trainer.fit_loop._data_fetcher._start_profiler = loop._on_before_fetch
    loop._on_before_fetch()


def use_own_loader_states(checkpoint: dict[str, Any], own: Any) -> None:
    """Replace the loader states of another rank by those that this rank has saved, if they are of the same place.

    A rank that was stopped in the middle of a batch has loaded one batch more than a rank that finished its step. All
    ranks must continue with the same batch, or the first one whose epoch ends leaves the others waiting.

    Args:
        checkpoint: The checkpoint dict, changed in place.
        own: The dict as this rank saved it; ``None`` if it saved none at that step.

    """
    if own is None or "loops" not in own:
        return
    loop, own_loop = checkpoint["loops"]["fit_loop"], own["loops"]["fit_loop"]
    state, own_state = loop["state_dict"], own_loop["state_dict"]
    if loop["epoch_progress"]["current"]["ready"] != own_loop["epoch_progress"]["current"]["ready"]:
        return
    if ORDERS in own_state:
        state[ORDERS] = own_state[ORDERS]
    batch, own_batch = (of["epoch_loop.batch_progress"]["current"]["processed"] for of in (loop, own_loop))
    if "combined_loader" in own_state and batch == own_batch:
        state["combined_loader"] = own_state["combined_loader"]
