"""What a directory holds before a run resumes from it."""

from lightning_scar.core.restoration import NoCheckpointError
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.storage import head
from lightning_scar.storage.head import Head
from lightning_scar.storage.index import newest_lineage


def newest_heads(running: RunningCheckpoint) -> dict[int, Head]:
    """The head of each rank's newest save, as this host saw it when it opened the directory; empty if it holds none.

    Args:
        running: Just opened: it has saved nothing yet.

    """
    # Its index counts what it saves itself, unless it restores.
    lineage = newest_lineage(running.store.deltas)
    return head.newest_heads(delta.head for delta in running.store.deltas if delta.head.incarnation in lineage)


def check_not_all_damaged(running: RunningCheckpoint) -> None:
    """Refuses to begin anew beside damaged files: that must be asked for.

    Raises:
        NoCheckpointError: If there is nothing left but such.

    """
    damaged = running.store.damaged
    if damaged and not newest_heads(running):
        damage = "\n  ".join(map(str, damaged[:8]))
        raise NoCheckpointError(
            f"{running.store.directory} holds nothing but damaged files:\n  {damage}\n"
            "To begin anew, choose another dirpath, or set `resume=False`, which replaces them."
        )
