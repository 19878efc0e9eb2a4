"""How much memory saves take, and what the user is told of it."""

import shutil
import sys
from collections.abc import Mapping

from lightning_scar.core.memory import readable
from lightning_scar.core.notices import Notices
from lightning_scar.core.settings import Settings
from lightning_scar.core.stats import Stats
from lightning_scar.storage.compaction import NEWEST_ONLY
from lightning_scar.storage.tiered_rank_store import TieredRankStore

#: A copy that lags so many saves behind is worth a warning.
_FAR_BEHIND = 8
_NO_ROOM = (
    "saves that find no room there go to storage at once. Give memory more room (--shm-size for a container), or leave "
    "memory out"
)


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
    need = int((NEWEST_ONLY.states + settings.fraction) * share)
    free = min(shutil.disk_usage(folder).free, settings.memory_limit or sys.maxsize)
    if need > free:
        has = f"{folder} has {readable(free)} for it"
        notices.warn("memory", f"this rank may need {readable(need)} of memory, and {has}; {_NO_ROOM}")
    elif store.storage.rank == 0:
        notices.tell(
            f"saves go to memory first, {folder}: at most {readable(need)} a rank, of {readable(free)} that are free. "
            f"Every {f'{every} saves' if every > 1 else 'save'} what is new there goes to {store.directory}, too."
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
        notices.warn("no_room", f"a save could not go to memory ({store.trouble!r}); {_NO_ROOM}")
    if trouble is not None:
        notices.warn("replication", f"this rank's memory is not copied to other hosts: {trouble!r}")
    if store.chain is not None and stats.unreplicated_saves > _FAR_BEHIND:
        notices.warn(
            "replication",
            f"the copies of this rank's memory on other hosts lag {stats.unreplicated_saves} saves behind "
            f"({store.chain.trouble!r}); counted as unreplicated_saves",
        )


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
