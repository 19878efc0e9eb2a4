"""The memory of a run's other hosts: served to each other, copied along a chain, read in a recovery."""

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from lightning_scar.core.claim import Seat
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.restoration import DisagreementError
from lightning_scar.core.settings import Settings
from lightning_scar.storage.address_book import AddressBook, Entry
from lightning_scar.storage.chain import Chain
from lightning_scar.storage.directory import Tier
from lightning_scar.storage.folder_server import FolderServer
from lightning_scar.storage.neighbour import PROTOCOL, NeighbourFileSystem
from lightning_scar.storage.store import DeltaStore
from lightning_scar.storage.tiered_rank_store import FAREWELL_SECONDS, TieredRankStore

T = TypeVar("T")


class Neighbours:
    """What one rank has to do with the memory of other hosts.

    Making one is a collective, except with a seat.

    Args:
        store: The running checkpoint.
        ranks: All ranks of the run.
        settings: Whether there is memory, and how many copies of it.
        token: Of the run's lease; ``None`` if the directory cannot be written to.
        seat: That of a rank that died.

    Attributes:
        key: Of all servers of the run; ``None`` if there is no other host, or nothing is copied.
        trouble: Why this rank's memory is not copied, if so.
        lost: The ranks whose host's memory could not be read in a recovery, and why.

    """

    def __init__(
        self,
        store: TieredRankStore,
        ranks: Ranks,
        settings: Settings,
        token: str | None,
        seat: Seat | None = None,
    ) -> None:
        self._store = store
        self._ranks = ranks
        self._settings = settings
        self._address = _own_address(os.environ.get("MASTER_ADDR", "127.0.0.1"))
        self._server: FolderServer | None = None
        self._first = ranks.rank
        self._seen: dict[int, list[DeltaStore]] = {}
        self.lost: dict[int, str] = {}
        self.trouble: OSError | None = None
        self.key = seat.key if seat is not None else self._agree(copies=settings.memory and settings.replicas > 0)
        # What only a recovery needs has a key of its own.
        self._server_key = self.key or secrets.token_bytes(32)
        self._book = AddressBook(store.directory, token) if token is not None and self.key is not None else None
        if seat is not None:
            store.local_ranks = self._ranks_here()
        if self._book is not None:
            try:
                self._join_chain(self._book, is_seated=seat is not None)
            except OSError as error:
                # Training goes on without copies.
                self.trouble = error

    def _agree(self, copies: bool) -> bytes | None:
        """Finds out who is on which host, and gives everybody the same key."""
        about = self._ranks.gather((self._store.host, self._address, secrets.token_bytes(32)))
        hosts, addresses, keys = zip(*about, strict=True)
        self._store.local_ranks = {rank for rank, host in enumerate(hosts) if host == self._store.host}
        if self._address.startswith("127."):
            # To the first host its own name may lead over the loopback, which leads nobody else to it.
            others = [address for address in addresses if not address.startswith("127.")]
            self._address = _own_address(others[0]) if others else self._address
        return keys[0] if copies and len(set(hosts)) > 1 else None

    def _ranks_here(self) -> set[int]:
        """The ranks of this host, for one that takes the place of another."""
        if self._book is None:
            return set(range(self._ranks.world_size))
        entries = self._book.read(self._ranks.world_size)
        return {self._ranks.rank, *(entry.rank for entry in entries if entry.memory == self._store.host)}

    def _join_chain(self, book: AddressBook, is_seated: bool) -> None:
        """Serves this host's memory, and has this rank's own copied to the next hosts."""
        assert self._store.memory is not None
        assert self._store.host is not None
        rank = self._ranks.rank
        # One rank of a host serves it; who takes the place of one that did, does, too.
        served_before = any(entry.rank == rank and entry.port for entry in book.read(self._ranks.world_size))
        is_server = served_before if is_seated else rank == min(self._store.local_ranks)
        host, port = self._serve() if is_server else (self._address, 0)
        entry = Entry(rank, self._store.host, host, port)
        book.write(entry)
        folder = self._store.memory_folders[0] / self._store.memory.folder
        name = "/".join(folder.parts[-2:])
        copies = self._settings.replicas
        self._store.chain = Chain(folder, name, entry, book, self._server_key, self._ranks.world_size, copies)

    # -- a recovery ----------------------------------------------------------------------------------------------

    @contextmanager
    def look(self) -> Iterator[bool]:
        """Lets the store read what other hosts have in memory, until the end of the ``with`` block. A collective.

        What not all ranks can reach is left out by all, on its own host, too: they have to see the same.

        Yields:
            Whether any host has anything in memory.

        """
        hosts = self._ranks.gather(self._store.host)
        self._first, self.lost = hosts.index(self._store.host), {}
        try:
            if len(set(hosts)) > 1:
                self._see()
            yield any(host is not None for host in hosts)
        finally:
            self._store.see([])
            if self._book is None and self._server is not None:
                # Nobody copies anything to here.
                self._server.close()
                self._server = None

    def read(self, read: Callable[[], T]) -> T:
        """Calls a function that reads, and again without hosts that were lost meanwhile if some ranks read of them.

        Args:
            read: A collective.

        Raises:
            DisagreementError: If ranks see different things, and no host was lost.

        """
        try:
            return read()
        except DisagreementError:
            if not self._leave_out(self._lost_since()):
                raise
        return self.read(read)

    def _see(self) -> None:
        offer, lost = None, {}
        # Of several ranks on a host the first one serves it.
        if self._first == self._ranks.rank and self._store.host is not None:
            try:
                offer = *self._serve(), self._server_key, [folder.name for folder in self._store.memory_folders]
            except OSError as error:
                lost = {self._ranks.rank: str(error)}
        self._seen = {
            rank: [
                DeltaStore(f"{PROTOCOL}://{host}:{port}/{folder}", {"key": key}, Tier.NEIGHBOUR) for folder in folders
            ]
            for rank, found in enumerate(self._ranks.gather(offer))
            if found is not None and rank != self._first
            for host, port, key, folders in [found]
        }
        self._leave_out(lost | self._ranks.together(self._reach))

    def _reach(self) -> dict[int, str]:
        """Lists what other hosts have; returns the ranks of whom that cannot be read, and why."""
        found = {rank: self._list(stores) for rank, stores in self._seen.items()}
        return {rank: why for rank, why in found.items() if why is not None}

    def _list(self, stores: Sequence[DeltaStore]) -> str | None:
        try:
            for neighbour in stores:
                neighbour.refresh()
                neighbour.count(self._store.index.lineage)
        except OSError as error:
            return str(error)
        return None

    def _lost_since(self) -> dict[int, str]:
        files = [(rank, store.directory.fs) for rank, stores in self._seen.items() for store in stores]
        return {rank: str(fs.lost) for rank, fs in files if isinstance(fs, NeighbourFileSystem) and fs.lost}

    def _leave_out(self, lost: dict[int, str]) -> bool:
        """Sees nothing of the hosts that some rank has lost; returns whether there is any. A collective."""
        found = {rank: why for each in self._ranks.gather(lost) for rank, why in each.items()}
        self.lost |= found
        self._seen = {rank: stores for rank, stores in self._seen.items() if rank not in self.lost}
        seen = [store for stores in self._seen.values() for store in stores]
        self._store.see(seen, own=self._first not in self.lost)
        return bool(found)

    # -- the end -------------------------------------------------------------------------------------------------

    def close(self, done: bool) -> bool:
        """Serves nobody any more.

        Args:
            done: Whether all that this rank had in memory is in storage. Then its copies are removed.

        Returns:
            Whether all other hosts are done, too, and the copies here not needed any more.

        """
        if self._store.chain is not None:
            self._store.chain.close(remove=done)
            self._store.chain = None
        all_done = done and (self._book is None or self._wait_for_others(self._book))
        if self._server is not None:
            self._server.close()
            self._server = None
        return all_done

    def _wait_for_others(self, book: AddressBook) -> bool:
        """Serves the others until they have removed their copies, or do not come to it."""
        book.erase(self._ranks.rank)
        deadline = time.monotonic() + FAREWELL_SECONDS
        while any(entry.memory != self._store.host for entry in book.read(self._ranks.world_size)):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _serve(self) -> tuple[str, int]:
        if self._server is None:
            folder, limit = self._store.memory_folders[0].parent, self._settings.memory_limit
            self._server = FolderServer(folder, self._server_key, self._address, limit)
        return self._server.address


def _own_address(other: str) -> str:
    """The address of this host in the network that leads to another one; the loopback's if no way leads there."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing: it only asks for the way.
        probe.connect((other, 9))
        address: str = probe.getsockname()[0]
        return address
    return "127.0.0.1"
