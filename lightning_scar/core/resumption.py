"""Checks of a directory before a run resumes from it."""

from lightning_scar.core.restoration import NoCheckpointError
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.storage import head
from lightning_scar.storage.head import Head
from lightning_scar.storage.index import newest_lineage


def newest_heads(running: RunningCheckpoint) -> dict[int, Head]:
    """Return the head of each rank's newest save, as this host saw it when it opened the directory.

    Args:
        running: The running checkpoint, before its first save.

    """
    # Until it restores, its index counts only its own saves.
    lineage = newest_lineage(running.store.deltas)
    return head.newest_heads(delta.head for delta in running.store.deltas if delta.head.incarnation in lineage)


def check_not_all_damaged(running: RunningCheckpoint) -> None:
    """Refuse to start fresh if all files are damaged: the user must ask for that.

    Raises:
        NoCheckpointError: If all files are damaged.

    """
    damaged = running.store.damaged
    if damaged and not newest_heads(running):
        damage = "\n  ".join(map(str, damaged[:8]))
        raise NoCheckpointError(
            f"{running.store.directory} holds only damaged files:\n  {damage}\n"
            "To start fresh, choose another dirpath, or set `resume=False`, which replaces them."
        )
