"""The counters of a checkpoint's loops, and what was left to do when it was made.

Lightning counts in the middle of hooks, and guesses from the counters where a resumed run is: after the last batch of
an epoch it takes the epoch for finished, and a validation that was due for done. Here each checkpoint is brought to the
boundary of a batch, and says what follows.
"""

from typing import Any, Literal

#: What was left to do: all that follows a batch, such as a validation; the end of the epoch; or only the next batch.
Pending = Literal["batch end", "epoch end", "nothing"]

#: The key of what this package adds to a checkpoint dict.
KEY = "lightning_scar"


def settle(checkpoint: dict[str, Any]) -> Pending:
    """Bring the counters of a checkpoint dict to the boundary of a batch or of an epoch.

    Args:
        checkpoint: The checkpoint dict, changed in place.

    Returns:
        What was left to do.

    """
    loop = checkpoint["loops"]["fit_loop"]
    epoch, batch = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    pending: Pending | None = checkpoint.get(KEY, {}).get("pending")
    if epoch["current"]["processed"] >= epoch["current"]["started"]:
        _set(epoch, dict.fromkeys(epoch["current"], epoch["current"]["processed"]))
        return "nothing"
    undo_unfinished_step(checkpoint, 1)
    processed = epoch["current"]["processed"]
    _set(epoch, {"ready": processed + 1, "started": processed + 1, "completed": processed})
    done = batch["current"]["processed"]
    if pending is None:
        pending = "batch end" if batch["current"]["completed"] < done else "nothing"
    _set(batch, dict.fromkeys(batch["current"], done))
    return pending if done else "nothing"


def reopen_epoch(checkpoint: dict[str, Any]) -> None:
    """Set the counters of a checkpoint dict from the end of an epoch, or behind it, back to before it.

    Args:
        checkpoint: The checkpoint dict, changed in place.

    """
    epoch = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    before = epoch["current"]["processed"] - 1
    _set(epoch, {"processed": before, "completed": before})


def undo_unfinished_step(checkpoint: dict[str, Any], accumulated: int) -> None:
    """Reset the counters of a checkpoint dict from the middle of a step to the start of that step.

    Args:
        checkpoint: The checkpoint dict, changed in place.
        accumulated: The number of batches in a step; no checkpoint holds their gradients.

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


def _set(progress: dict[str, Any], values: dict[str, int]) -> None:
    """Set the counters of a run, and move those over all runs as far."""
    before = dict(progress["current"])
    progress["current"].update(values)
    for name, value in values.items():
        progress["total"][name] += value - before[name]


def _set_back(progress: dict[str, Any], pending: int) -> None:
    """Set all counters to what is done, minus what must be repeated."""
    for value in progress.values():
        if isinstance(value, dict):
            _set_back(value, pending)
    if "completed" in progress:
        done = progress.get("processed", progress["completed"]) - pending
        progress.update(dict.fromkeys(progress, done))
