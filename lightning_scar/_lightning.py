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
    original = connector.resume_start

    def resume_start(checkpoint_path: Any = None, *args: Any, **kwargs: Any) -> None:
        connector.resume_start = original  # type: ignore[method-assign]
        path = choose(checkpoint_path)
        original(path, *args, **kwargs)
        if path:
            loaded(path, connector._loaded_checkpoint)

    connector.resume_start = resume_start  # type: ignore[method-assign]


def logger_step(trainer: pl.Trainer) -> int:
    """The step that Lightning gives its loggers; loggers want steps that never fall."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def mark_sigterm(trainer: pl.Trainer) -> None:
    """Makes the training loop end with ``SIGTERMException`` after the present batch."""
    trainer._signal_connector.received_sigterm = True
