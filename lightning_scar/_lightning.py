"""The private parts of Lightning that this package leans on.

Each stands behind one function here, and each function has a test that fails loudly when Lightning changes.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl


def dump_checkpoint(trainer: pl.Trainer) -> dict[str, Any]:
    """Lightning's own checkpoint dict, with references to live tensors.

    The public ``Trainer.save_checkpoint`` would write it, and end in a barrier.
    """
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def intercept_resume(
    trainer: pl.Trainer,
    choose: Callable[[str | None], str | None],
    loaded: Callable[[str, dict[str, Any]], None],
) -> None:
    """Lets a callback's ``setup`` decide what the call under way resumes from.

    ``setup`` runs before the checkpoint is read, but does not learn which one was asked for.

    Args:
        trainer: The trainer whose ``fit``, ``validate``, ``test`` or ``predict`` is under way.
        choose: Gets the path that the user asked for, returns the one to load.
        loaded: Gets that path and the checkpoint dict, before anything is restored from it; may change the dict.

    """
    connector = trainer._checkpoint_connector

    def resume_start(checkpoint_path: Any = None, *args: Any, **kwargs: Any) -> None:
        end_interception(trainer)
        path = choose(checkpoint_path)
        connector.resume_start(path, *args, **kwargs)
        if path:
            loaded(path, connector._loaded_checkpoint)

    connector.resume_start = resume_start  # type: ignore[method-assign]


def end_interception(trainer: pl.Trainer) -> None:
    """Undoes :func:`intercept_resume`, if a call failed before it came to loading."""
    vars(trainer._checkpoint_connector).pop("resume_start", None)


def begin_next_epochs_data(trainer: pl.Trainer) -> None:
    """Moves loaders that were restored at the end of their epoch to the next one.

    Lightning takes such an iterator as it is: the next epoch would pass without a single batch.
    """
    loop = trainer.fit_loop
    at_end = loop.epoch_loop.restarted_on_train_batch_end and loop.epoch_loop.batch_progress.is_last_batch
    if at_end and loop._combined_loader is not None and loop._combined_loader._state_dicts():
        iter(loop._data_fetcher)  # type: ignore[call-overload]


def logger_step(trainer: pl.Trainer) -> int:
    """The step that Lightning gives its loggers; loggers want steps that never fall."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def mark_sigterm(trainer: pl.Trainer) -> None:
    """Makes the training loop end with ``SIGTERMException`` after the present batch."""
    trainer._signal_connector.received_sigterm = True
