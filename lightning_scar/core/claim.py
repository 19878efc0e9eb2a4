"""The directory of a running checkpoint, taken by all ranks of one run."""

import socket
from collections.abc import Sequence
from typing import NamedTuple

from lightning_scar.core.ranks import Ranks
from lightning_scar.storage.delta import StorageError
from lightning_scar.storage.lease import Lease, tokens_of
from lightning_scar.storage.tiered_rank_store import TieredRankStore


class Seat(NamedTuple):
    """What a process must know to take the place of a rank that died, in the middle of a run.

    Attributes:
        incarnation: The number of the run's start.
        lineage: Those of the starts that it continues.
        sequence: How many saves the run has begun.
        token: Of the run's lease; ``None`` if the directory cannot be written to.
        key: Of the servers of its memory; ``None`` if there are none.

    """

    incarnation: int
    lineage: tuple[int, ...]
    sequence: int
    token: str | None
    key: bytes | None = None


class Claim:
    """The right of a run to write to a directory. The first rank holds its lease, the others follow it.

    Making one is a collective, except with a seat: on an error of any rank all raise.

    Args:
        store: The directory, as this rank writes to it.
        ranks: All ranks of the run.
        seat: That of a rank that died, to be taken without the others.

    Attributes:
        incarnation: The number of this start of the training.
        trouble: Why the directory cannot be written to, if so; on all ranks, so that they go on or end together.

    Raises:
        StorageError: If the directory holds something else, or some rank sees another one under its name.
        DirectoryInUseError: If another live run holds it.

    """

    def __init__(self, store: TieredRankStore, ranks: Ranks, seat: Seat | None = None) -> None:
        self._store = store
        self._ranks = ranks
        self._lease = Lease(store.directory, memory=store.has_memory)
        #: Whether the last start saved to memory, and none of these hosts has any of it.
        self.memory_is_lost = False
        self.trouble: OSError | None = None
        try:
            if seat is not None:
                self._sit_down(seat)
                return
            token, previous, host, trouble = ranks.gather(ranks.together(self._take))[0]
            if trouble is not None and self.trouble is None:
                self.trouble = OSError(trouble)
            ranks.together(lambda: self._follow(token, host))
            self.incarnation = 1 + max(ranks.gather(ranks.together(lambda: self._enter(token, previous))))
            left = {folder.name for folders in ranks.gather(store.memory_folders) for folder in folders}
            self.memory_is_lost = token is not None and self._lease.needs_memory and not left & set(previous)
        except BaseException:
            self._store.leave_memory(remove=False)
            self.release()
            raise

    @property
    def token(self) -> str | None:
        """That of the run's lease; ``None`` if the directory cannot be written to."""
        return None if self.trouble is not None else self._lease.token

    @property
    def is_lost(self) -> bool:
        """Whether another run has taken the directory over."""
        return self._lease.lost

    def release(self, is_stored: bool = True) -> None:
        """Gives the directory back.

        Args:
            is_stored: ``False`` if the next start has to find in memory what this one could not bring to storage.

        """
        self._lease.release(is_stored, has_memory=self._store.memory is not None)

    def _sit_down(self, seat: Seat) -> None:
        self.incarnation = seat.incarnation
        if seat.token is None:
            self.trouble = OSError("the run could not write to it before")
        elif self._ranks.rank == 0:
            self._lease.succeed(seat.token)
        else:
            self._lease.watch(seat.token)
        self._enter(seat.token, tokens_of(self._store.directory)[1:])

    def forget_previous(self) -> None:
        """Nothing of what earlier starts have left in memory is needed any more."""
        self._lease.continues = []

    def _take(self) -> tuple[str | None, list[str], str, str | None]:
        if foreign := self._store.foreign_names():
            raise StorageError(
                f"{self._store.directory} holds something else than a running checkpoint ({', '.join(foreign[:3])}"
                f"{', ...' if len(foreign) > 3 else ''}). Choose an empty or new directory."
            )
        self._store.refresh()
        if self._ranks.rank == 0:
            try:
                self._lease.acquire()
            except OSError as error:
                self.trouble = error
        if self.trouble is not None:
            return None, [], socket.gethostname(), str(self.trouble)
        return self._lease.token, self._lease.continues, socket.gethostname(), None

    def _follow(self, token: str | None, host: str) -> None:
        if self._ranks.rank == 0 or token is None:
            return
        if not self._lease.is_visible(token):
            raise StorageError(
                f"{self._store.directory} is not the same directory on all ranks: rank {self._ranks.rank} on "
                f"{socket.gethostname()} does not see what rank 0 on {host} wrote there. Put dirpath on a file system "
                "that all ranks share, and give all the same."
            )
        self._lease.watch(token)

    def _enter(self, token: str | None, previous: Sequence[str]) -> int:
        if token is not None:
            self._store.enter(token, previous)
        self._store.refresh()
        return max((delta.head.incarnation for delta in self._store.deltas), default=0)
