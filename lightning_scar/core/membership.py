"""The directory of a running checkpoint, taken by all ranks of one run."""

import socket
from typing import NamedTuple

from lightning_scar.core.ranks import Ranks
from lightning_scar.core.settings import Settings
from lightning_scar.storage.delta import StorageError
from lightning_scar.storage.directory import Tier
from lightning_scar.storage.host_memory import HostMemory, left_in_memory
from lightning_scar.storage.lease import Lease
from lightning_scar.storage.rank_store import RankStore
from lightning_scar.storage.write_back import bring_in, drop


class ReplacementTicket(NamedTuple):
    """What a process must know to take the place of a rank that died, in the middle of a run.

    Attributes:
        incarnation: The number of the run's start.
        lineage: Those of the starts that it continues.
        sequence: How many saves the run has begun.
        token: Of the run's lease; ``None`` if the directory cannot be written to.
        run: What the lease calls the run.
        key: Of the servers of its memory; ``None`` if there are none.

    """

    incarnation: int
    lineage: tuple[int, ...]
    sequence: int
    token: str | None
    run: str
    key: bytes | None = None


class RunMembership:
    """The right of the ranks of one run to write to a directory. The first rank holds its lease, the others follow it.

    The constructor is a collective, except with a ticket: on an error of any rank all raise. It brings to storage what
    earlier starts have left in the memory of these hosts.

    Args:
        store: The directory, as this rank writes to it.
        ranks: All ranks of the run.
        settings: Whether saves go to memory.
        ticket: For the replacement of a dead rank, which does not wait for the others.

    Attributes:
        incarnation: The number of this start of the training.
        trouble: Why the directory cannot be written to, if so; on all ranks, so that they go on or end together.
        memory_is_lost: Whether earlier starts saved to memory, and none of these hosts has any of it.
        unread: Why what lies in memory could not be brought to storage, if so, by rank.

    Raises:
        StorageError: If the directory holds something else, or some rank sees another one under its name.
        DirectoryInUseError: If another live run holds it.

    """

    def __init__(
        self, store: RankStore, ranks: Ranks, settings: Settings, ticket: ReplacementTicket | None = None
    ) -> None:
        self._store = store
        self._ranks = ranks
        self._settings = settings
        self._lease = Lease(store.directory.storage, memory=settings.memory)
        self.memory_is_lost = False
        self.trouble: OSError | None = None
        self.unread: dict[int, str] = {}
        try:
            if ticket is not None:
                self._take_over(ticket)
                return
            token, run, host, trouble = ranks.gather(ranks.together(self._take))[0]
            if trouble is not None and self.trouble is None:
                self.trouble = OSError(trouble)
            ranks.together(lambda: self._follow(token, run, host))
            self._take_in_memory()
            self.incarnation = 1 + max(ranks.gather(ranks.together(self._newest_incarnation)))
            self._lease.begin(self.incarnation)
        except BaseException:
            self._store.leave_memory(is_stored=False)
            self.release()
            raise

    @property
    def token(self) -> str | None:
        """That of the run's lease; ``None`` if the directory cannot be written to."""
        return None if self.trouble is not None else self._lease.token

    @property
    def run(self) -> str:
        """What the lease calls the run."""
        return self._lease.run

    @property
    def is_lost(self) -> bool:
        """Whether another run has taken the directory over."""
        return self._lease.lost

    def release(self, is_stored: bool = True) -> None:
        """Give the directory back.

        Args:
            is_stored: ``False`` if the next start has to find in memory what this one could not bring to storage.

        """
        self._lease.release(is_stored, has_memory=self._store.directory.memory is not None)

    def forget_lost_memory(self) -> None:
        """Note that the loss of what earlier starts had in memory has been told."""
        self._lease.left_unstored = False

    def _take_over(self, ticket: ReplacementTicket) -> None:
        self.incarnation = ticket.incarnation
        if ticket.token is None:
            self.trouble = OSError("the run could not write to it before")
        elif self._ranks.rank == 0:
            self._lease.succeed(ticket.token)
        else:
            self._lease.watch(ticket.token, ticket.run)
        self._store.directory.memory = self._open_memory(self._is_left_here)
        self._store.open(self._settings.durable_every_n_saves)

    def _take(self) -> tuple[str | None, str, str, str | None]:
        if foreign := self._store.foreign_names():
            raise StorageError(
                f"{self._store.directory} holds something else than a running checkpoint ({', '.join(foreign[:3])}"
                f"{', ...' if len(foreign) > 3 else ''}). Choose an empty or new directory."
            )
        if self._ranks.rank == 0:
            try:
                self._lease.acquire()
            except OSError as error:
                self.trouble = error
        if self.trouble is not None:
            return None, self._lease.run, socket.gethostname(), str(self.trouble)
        return self._lease.token, self._lease.run, socket.gethostname(), None

    def _follow(self, token: str | None, run: str, host: str) -> None:
        if self._ranks.rank == 0 or token is None:
            return
        if not self._lease.is_visible(token):
            raise StorageError(
                f"{self._store.directory} is not the same directory on all ranks: rank {self._ranks.rank} on "
                f"{socket.gethostname()} does not see what rank 0 on {host} wrote there. Put dirpath on a file system "
                "that all ranks share, and give all the same."
            )
        self._lease.watch(token, run)

    # -- memory --------------------------------------------------------------------------------------------------

    def _take_in_memory(self) -> None:
        """Bring to storage what lies in the memory of these hosts, so that all ranks see the same. A collective."""
        is_left_here = self._is_left_here
        left, unstored = zip(*self._ranks.gather((is_left_here, self._lease.left_unstored)), strict=True)
        # The first rank has read the lease.
        self.memory_is_lost = self.trouble is None and unstored[0] and not any(left)
        memory = self._ranks.together(lambda: self._open_memory(is_left_here))
        hosts = self._ranks.gather(memory.name if memory is not None else None)
        here = [rank for rank, host in enumerate(hosts) if host == hosts[self._ranks.rank]]
        brought = self._ranks.gather(self._bring_in(memory, here.index(self._ranks.rank), len(here)))
        self.unread = {rank: found for rank, found in enumerate(brought) if isinstance(found, str)}
        if memory is None:
            return
        if self.unread and self._ranks.world_size > 1:
            # The other ranks would not see what is left there.
            memory.leave()
            return
        store = self._store
        store.local_ranks = set(here)
        store.directory.brought = {
            name: Tier.MEMORY if rank in here else Tier.NEIGHBOUR
            for rank, found in enumerate(brought)
            if not isinstance(found, str)
            for name in found
        }
        if not self.unread:
            drop(memory, lambda folder: self._settings.memory and store.is_local(folder))
            self._lease.left_unstored &= self.memory_is_lost
        if self._settings.memory or self.unread:
            store.directory.memory = memory
        else:
            memory.leave()

    @property
    def _is_left_here(self) -> bool:
        return self.trouble is None and left_in_memory(self._store.directory.storage, self._lease.run) is not None

    def _open_memory(self, is_left_here: bool) -> HostMemory | None:
        """Return the run's folder in this host's memory, if saves go there or earlier ones did."""
        if self.trouble is not None or not (self._settings.memory or is_left_here):
            return None
        return HostMemory(self._store.directory.storage, self._lease.run, self._settings.memory_limit)

    def _bring_in(self, memory: HostMemory | None, share: int, shares: int) -> set[str] | str:
        """Return the names of the files brought to storage, or why they could not be."""
        try:
            return bring_in(self._store.directory, memory, share, shares) if memory is not None else set()
        except OSError as error:
            return repr(error)

    def _newest_incarnation(self) -> int:
        """Return the newest start that has saved anything, or that the lease knows of."""
        self._store.open(self._settings.durable_every_n_saves)
        # Only the first rank has read the lease; it is 0 on the others.
        return max([self._lease.incarnation, *(delta.head.incarnation for delta in self._store.deltas)])
