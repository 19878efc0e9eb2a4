"""The hosts of a run: which ranks share a memory, and the copies of it on other hosts."""

import os
import secrets
import socket
import time
from contextlib import suppress

from lightning_scar.core.membership import ReplacementTicket
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.settings import Settings
from lightning_scar.storage.chain import Address, Addresses, Chain
from lightning_scar.storage.neighbour import Server
from lightning_scar.storage.rank_store import RankStore

#: Seconds that a host waits until the others have brought to storage what it has copies of.
_CLOSE_SECONDS = 10.0


class Neighbours:
    """Copies of what one rank has in memory only, on other hosts, and theirs on this one.

    The constructor is a collective, except with a ticket.

    Args:
        store: The running checkpoint.
        ranks: All ranks of the run.
        settings: Whether there is memory, and how many copies of it.
        token: Of the run's lease; ``None`` if the directory cannot be written to.
        ticket: For the replacement of a dead rank.

    Attributes:
        key: Of all servers of the run; ``None`` if there is no other host, or nothing is copied.
        trouble: Why this rank's memory is not copied, if so.

    """

    def __init__(
        self,
        store: RankStore,
        ranks: Ranks,
        settings: Settings,
        token: str | None,
        ticket: ReplacementTicket | None = None,
    ) -> None:
        self._store = store
        self._ranks = ranks
        self._settings = settings
        self._address = _own_address(_first_host())
        self._server: Server | None = None
        self._addresses: Addresses | None = None
        self.trouble: OSError | None = None
        self.key = ticket.key if ticket is not None else self._agree()
        if token is not None and self.key is not None:
            try:
                self._join_chain(Addresses(store.directory.storage, token), self.key, ticket)
            except OSError as error:
                # Training goes on without copies.
                self.trouble = error

    def _agree(self) -> bytes | None:
        """Give all ranks the same key if they are on several hosts."""
        host = self._store.host if self._settings.replicas > 0 else None
        hosts, addresses, keys = zip(*self._ranks.gather((host, self._address, secrets.token_bytes(32))), strict=True)
        if self._address.startswith("127."):
            # To the first host its own name may lead over the loopback, which leads nobody else to it.
            others = [address for address in addresses if not address.startswith("127.")]
            self._address = _own_address(others[0]) if others else self._address
        return keys[0] if None not in hosts and len(set(hosts)) > 1 else None

    def _join_chain(self, addresses: Addresses, key: bytes, ticket: ReplacementTicket | None) -> None:
        """Take in what other hosts copy, and have this rank's own copied to the next hosts."""
        write_back, host = self._store.write_back, self._store.host
        assert write_back is not None
        assert host is not None
        rank, limit = self._ranks.rank, self._settings.memory_limit
        self._server = Server(write_back.memory, key, self._address, limit)
        own = Address(rank, host, *self._server.address)
        addresses.write(own)
        self._addresses = addresses
        if ticket is not None:
            known = addresses.read(self._ranks.world_size)
            self._store.local_ranks = {rank, *(address.rank for address in known if address.memory == host)}
        self._store.chain = Chain(
            write_back.memory,
            self._store.own_folders(),
            lambda: write_back.unstored,
            own,
            addresses,
            key,
            self._ranks.world_size,
            self._settings.replicas,
        )

    def close(self, is_stored: bool) -> None:
        """Take in nothing any more, and delete the copies here when nobody needs them.

        Args:
            is_stored: Whether all that this rank has saved is in storage.

        """
        if self._store.chain is not None:
            self._store.chain.close()
            self._store.chain = None
        if self._addresses is None or self._server is None:
            return
        if is_stored:
            self._addresses.erase(self._ranks.rank)
        all_done = is_stored and self._wait_for_others(self._addresses)
        self._server.close()
        if all_done:
            self._store.drop_copies()

    def _wait_for_others(self, addresses: Addresses) -> bool:
        """Return whether the other hosts are done; those that do not come to it may need their copies yet."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        while any(address.memory != self._store.host for address in addresses.read(self._ranks.world_size)):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


def _first_host() -> str:
    """Return the address of the host of rank 0. Under `lightning-scar run` MASTER_ADDR is the end of a tunnel."""
    return os.environ.get("LIGHTNING_SCAR_NODE_0") or os.environ.get("MASTER_ADDR", "127.0.0.1")


def _own_address(other: str) -> str:
    """Return the address of this host in the network that leads to another one, or the loopback's."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing: it only asks for the way.
        probe.connect((other, 9))
        address: str = probe.getsockname()[0]
        return address
    return "127.0.0.1"
