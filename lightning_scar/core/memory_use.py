"""How much memory saves take, and what the user is told of it."""

import errno
from collections.abc import Mapping

from lightning_scar.core.memory import readable
from lightning_scar.core.notices import Notices
from lightning_scar.core.settings import Settings
from lightning_scar.core.stats import Stats
from lightning_scar.storage.compaction import NEWEST_ONLY
from lightning_scar.storage.rank_store import LimitError
from lightning_scar.storage.tiered_rank_store import TieredRankStore

#: A copy that lags so many saves behind is worth a warning.
_FAR_BEHIND = 8
_TO_STORAGE = "saves that find no room there go to storage at once"
_MORE_ROOM = "Give memory more room (--shm-size for a container), or leave memory out"
_RAISE_LIMIT = "Raise memory_limit, or leave memory out"


def tell_of_memory(notices: Notices, store: TieredRankStore, settings: Settings, share: int) -> None:
    """States once how much memory saves will take, or warns that there is less.

    Args:
        notices: Tells it.
        store: Has memory.
        settings: How it is used.
        share: Bytes of the state that this rank owns.

    """
    assert store.memory is not None
    folder, every = store.memory.directory.path, settings.durable_every_n_saves
    each = int((NEWEST_ONLY.states + settings.fraction) * share)
    local = len(store.local_ranks)
    # Hosts are taken to be alike: this one keeps as many copies for others as they do for it.
    copies = min(settings.replicas * local, store.storage.world_size - local) if store.chain is not None else 0
    need, limit = each * (local + copies), settings.memory_limit
    if limit is not None and each > limit:
        notices.warn(
            "memory",
            f"this rank may need {readable(each)} of memory, and memory_limit={limit} allows {readable(limit)}; "
            f"{_TO_STORAGE}. {_RAISE_LIMIT}",
        )
    elif not store.is_first_here:
        return
    elif need > (room := store.room):
        notices.warn(
            "memory",
            f"this host may need {readable(need)} of memory, and {folder} has {readable(room)} for it; "
            f"{_TO_STORAGE}. {_MORE_ROOM}",
        )
    elif store.storage.rank == 0:
        inherited = store.inherited_bytes
        ranks = f"{local} ranks" if local > 1 else "a rank"
        of_others = f" and copies of {copies} of other hosts" if copies else ""
        left = f", beside {readable(inherited)} that dead starts have left until all is saved anew" if inherited else ""
        notices.tell(
            f"saves go to memory first, {folder}: at most {readable(need)} on a host for {ranks}{of_others}, of "
            f"{readable(room)} that are free{left}. Every {f'{every} saves' if every > 1 else 'save'} what is "
            f"new there goes to {store.directory}, too."
        )


def warn_of_memory(notices: Notices, store: TieredRankStore, stats: Stats, trouble: OSError | None) -> None:
    """Warns, once of each kind, of memory that was lost, of saves that found no room there and of copies not made.

    Args:
        notices: Warns.
        store: Where saves go.
        stats: How far copies lag behind.
        trouble: Why there are none, if so.

    """
    if store.memory is not None and store.memory.loss is not None:
        notices.warn(
            "loss",
            f"somebody has removed what this rank had in memory ({store.memory.loss}); it is saved anew. Leave that "
            "folder alone while the run lives, and exclude it from whatever cleans up there",
        )
    if store.trouble is not None:
        notices.warn("no_room", f"a save could not go to memory: {_explained(store.trouble)}")
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


def warn_of_lost_hosts(notices: Notices, lost: Mapping[int, str], rank: int) -> None:
    """Warns once, on the first rank, that a recovery goes on without the memory of some hosts.

    Args:
        notices: Warns.
        lost: The ranks that serve these hosts' memory, and why it cannot be read.
        rank: This rank.

    """
    if lost and rank == 0:
        found = "; ".join(f"that of rank {server}: {why}" for server, why in lost.items())
        hosts = f"{len(lost)} host{'s' * (len(lost) != 1)}"
        notices.warn(
            "lost_hosts",
            f"the memory of {hosts} cannot be read ({found}), and what only they have falls through to storage. "
            "Hosts have to reach each other on all ports, as process groups need it, too",
        )


def warn_of_lost_memory(notices: Notices, store: TieredRankStore) -> None:
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
