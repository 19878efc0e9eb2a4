"""How much memory saves take, and what the user is told of it."""

import errno
from collections.abc import Mapping

from lightning_scar.core.memory import readable
from lightning_scar.core.notices import Notices
from lightning_scar.core.settings import Settings
from lightning_scar.core.stats import Stats
from lightning_scar.storage.host_memory import LimitError
from lightning_scar.storage.rank_store import RankStore
from lightning_scar.storage.write_back import STATES

#: A copy that lags so many saves behind is worth a warning.
_FAR_BEHIND = 8
_TO_STORAGE = "saves that find no room there go to storage at once"
_MORE_ROOM = "Give memory more room (--shm-size for a container), or leave memory out"
_RAISE_LIMIT = "Raise memory_limit, or leave memory out"


def tell_of_memory(notices: Notices, store: RankStore, settings: Settings, share: int) -> None:
    """State once how much memory saves will take, or warn that there is less.

    Args:
        notices: Tells it.
        store: Has memory.
        settings: How it is used.
        share: Bytes of the state that this rank owns.

    """
    assert store.write_back is not None
    memory, every = store.write_back.memory, settings.durable_every_n_saves
    each = int((STATES + settings.fraction) * share)
    copy = int(min(STATES, every * settings.fraction) * share)
    local = len(store.local_ranks)
    # Hosts are taken to be alike: this one keeps as many copies for others as they do for it.
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
            f"this host may need {readable(need)} of memory, and {memory.path} has {readable(free)} for it; "
            f"{_TO_STORAGE}. {_MORE_ROOM}",
        )
    elif store.rank == 0:
        ranks = f"{local} ranks" if local > 1 else "a rank"
        of_others = f" and copies of {copies} of other hosts" if copies else ""
        notices.tell(
            f"saves go to memory first, {memory.path}: at most {readable(need)} on a host for {ranks}{of_others}, of "
            f"{readable(free)} that are free. Every {f'{every} saves' if every > 1 else 'save'} {store.directory} is "
            "brought up to date."
        )


def warn_of_memory(notices: Notices, store: RankStore, stats: Stats, trouble: OSError | None) -> None:
    """Warn, once of each kind, of memory that was lost, of saves that found no room there and of copies not made.

    Args:
        notices: Warns.
        store: Where saves go.
        stats: How far copies lag behind.
        trouble: Why there are none, if so.

    """
    if store.write_back is not None and store.write_back.loss is not None:
        notices.warn(
            "loss",
            f"somebody has removed what this rank had in memory ({store.write_back.loss}); it is saved anew. Leave "
            "that folder alone while the run lives, and exclude it from whatever cleans up there",
        )
    if store.directory.trouble is not None:
        notices.warn("no_room", f"a save could not go to memory: {_explained(store.directory.trouble)}")
    if trouble is not None:
        notices.warn("replication", f"this rank's memory is not copied to other hosts: {trouble!r}")
    if store.chain is not None and stats.unreplicated_saves > _FAR_BEHIND:
        why = store.chain.trouble or "more is saved than the network carries: save less often, or less at once"
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
    return f"{trouble!r}; it went to storage at once, as all do that memory does not take"


def warn_of_unread_memory(notices: Notices, unread: Mapping[int, str], rank: int) -> None:
    """Warn once, on the first rank, that what lies in memory could not be brought to storage.

    Args:
        notices: Warns.
        unread: Why, by rank.
        rank: This rank.

    """
    if unread and rank == 0:
        found = "; ".join(f"rank {of}: {why}" for of, why in unread.items())
        notices.warn(
            "unread_memory",
            f"what earlier starts have left in memory cannot be brought to storage ({found}). The run goes on from "
            "what all ranks can read, and saves all of it anew",
        )


def warn_of_lost_memory(notices: Notices, store: RankStore) -> None:
    """Warns that the last start saved to memory, and that nothing of it is left on any host.

    Args:
        notices: Warns.
        store: What is left.

    """
    notices.warn(
        "lost_memory",
        f"the last start that wrote to {store.directory} saved to memory first, and none of these hosts has any of it: "
        "what it saved since its last save in storage, if anything, is lost. It lay on another host, was removed by a "
        "reboot or by somebody, or the directory was moved: then resume from where it was",
    )
