"""Messages to the user about the memory that saves take."""

import errno
from collections.abc import Mapping

from lightning_scar.core.memory import readable
from lightning_scar.core.notices import Notices
from lightning_scar.core.settings import Settings
from lightning_scar.core.stats import Stats
from lightning_scar.storage.host_memory import LimitError
from lightning_scar.storage.rank_store import RankStore
from lightning_scar.storage.write_back import STATES

#: How many saves copies may lag behind without a warning.
_FAR_BEHIND = 8
_TO_STORAGE = "saves that do not fit go directly to storage"
_MORE_ROOM = "Provide more memory (--shm-size for a container), or do not set memory"
_RAISE_LIMIT = "Raise memory_limit, or do not set memory"


def tell_of_memory(notices: Notices, store: RankStore, settings: Settings, share: int) -> None:
    """Print once how much memory saves will take, or warn that there is too little.

    Args:
        notices: Prints or warns.
        store: A store with memory.
        settings: The settings.
        share: Bytes of the state that this rank owns.

    """
    assert store.write_back is not None
    memory, every = store.write_back.memory, settings.durable_every_n_saves
    each = int((STATES + settings.fraction) * share)
    copy = int(min(STATES, every * settings.fraction) * share)
    local = len(store.local_ranks)
    # Assumes that hosts are alike: this one keeps as many copies for others as they keep for it.
    copies = min(settings.replicas * local, store.world_size - local) if store.chain is not None else 0
    need, limit = each * local + copy * copies, settings.memory_limit
    if limit is not None and each > limit:
        notices.warn(
            "memory",
            f"this rank may need {readable(each)} of memory, and memory_limit={limit} allows {readable(limit)}; "
            f"{_TO_STORAGE}. {_RAISE_LIMIT}",
        )
    elif store.rank != min(store.local_ranks):
        return
    elif need > (free := memory.free_bytes + store.memory_bytes):
        notices.warn(
            "memory",
            f"this host may need {readable(need)} of memory, and {memory.path} has {readable(free)} free; "
            f"{_TO_STORAGE}. {_MORE_ROOM}",
        )
    elif store.rank == 0:
        ranks = f"{local} ranks" if local > 1 else "a rank"
        of_others = f" and {copies} copies for other hosts" if copies else ""
        notices.tell(
            f"saves go to memory first, {memory.path}: at most {readable(need)} per host for {ranks}{of_others}; "
            f"{readable(free)} are free. {store.directory} is updated every "
            f"{f'{every} saves' if every > 1 else 'save'}."
        )


def warn_of_memory(notices: Notices, store: RankStore, stats: Stats, trouble: OSError | None) -> None:
    """Warn once each of memory that was lost, saves that did not fit into it, and missing copies.

    Args:
        notices: Warns.
        store: The store.
        stats: Counts the saves that copies lag behind.
        trouble: Why there are no copies, if so.

    """
    if store.write_back is not None and store.write_back.loss is not None:
        notices.warn(
            "loss",
            f"somebody has removed files of this rank from memory ({store.write_back.loss}); their blocks are saved "
            "again. Do not touch that folder while the run lives, and exclude it from automatic cleanup",
        )
    if store.directory.trouble is not None:
        notices.warn("no_room", f"a save could not go to memory: {_explained(store.directory.trouble)}")
    if trouble is not None:
        notices.warn("replication", f"this rank's memory is not copied to other hosts: {trouble!r}")
    if store.chain is not None and stats.unreplicated_saves > _FAR_BEHIND:
        why = store.chain.trouble or "the network is too slow: save less often, or a smaller fraction"
        notices.warn(
            "replication",
            f"the copies of this rank's memory on other hosts lag {stats.unreplicated_saves} saves behind ({why}); "
            "counted as unreplicated_saves",
        )


def _explained(trouble: OSError) -> str:
    if isinstance(trouble, LimitError):
        return f"{trouble}; {_TO_STORAGE}. {_RAISE_LIMIT}"
    if trouble.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{trouble}; {_TO_STORAGE}. {_MORE_ROOM}"
    return f"{trouble!r}; it went directly to storage"


def warn_of_unread_memory(notices: Notices, unread: Mapping[int, str], rank: int) -> None:
    """Warn once, on rank 0, that saves in memory could not be copied to storage.

    Args:
        notices: Warns.
        unread: The reasons, by rank.
        rank: This rank.

    """
    if unread and rank == 0:
        found = "; ".join(f"rank {of}: {why}" for of, why in unread.items())
        notices.warn(
            "unread_memory",
            f"saves that earlier starts left in memory cannot be copied to storage ({found}). The run continues from "
            "what all ranks can read, and saves the whole state again",
        )


def warn_of_lost_memory(notices: Notices, store: RankStore) -> None:
    """Warn that the last start saved to memory, and that no host holds those saves.

    Args:
        notices: Warns.
        store: The store.

    """
    notices.warn(
        "lost_memory",
        f"the last start that wrote to {store.directory} saved to memory first, and none of these hosts has that "
        "memory: any saves after the last one in storage are lost. The memory was on another host, was removed by a "
        "reboot or by somebody, or the directory was moved; in the last case, resume from the old path",
    )
