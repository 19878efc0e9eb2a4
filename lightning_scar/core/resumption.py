"""What a directory holds before a run resumes from it."""

import os
from typing import Any

from lightning_scar.core.restoration import NoCheckpointError
from lightning_scar.storage.head import Head
from lightning_scar.storage.tiers import open_store


def newest_heads(url: str | os.PathLike[str], storage_options: dict[str, Any] | None = None) -> dict[int, Head]:
    """The head of each rank's newest save in a directory; empty if it holds none.

    Args:
        url: The directory.
        storage_options: Passed to the file system.

    Raises:
        NoCheckpointError: If there is nothing left but damaged files: beginning anew must be asked for.

    """
    store = open_store(url, storage_options)
    store.refresh()
    heads = dict(store.index.heads)
    if not heads and store.damaged:
        damage = "\n  ".join(map(str, store.damaged[:8]))
        raise NoCheckpointError(
            f"{url} holds nothing but damaged files:\n  {damage}\n"
            "To begin anew, choose another dirpath, or set `resume=False`, which replaces them."
        )
    return heads


def newest_step(url: str | os.PathLike[str], storage_options: dict[str, Any] | None = None) -> int:
    """The step of the newest save in a directory; -1 if it holds none.

    Args:
        url: The directory.
        storage_options: Passed to the file system.

    """
    store = open_store(url, storage_options)
    store.refresh()
    return max((head.step for head in store.index.heads.values()), default=-1)
