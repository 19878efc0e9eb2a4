"""Copies of what only a rank's memory has, in the memory of the next hosts, made in the background.

Chain replication (van Renesse and Schneider, OSDI 2004) as far as a running checkpoint needs it: files are immutable,
and any newest version will do, so a copy is a place that follows another one, file by file in their order, each
acknowledged. What a slow network does not carry in time is superseded and never sent.
"""

import json
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import NamedTuple

from lightning_scar.storage.directory import Directory
from lightning_scar.storage.neighbour import Neighbour, NoRoomError
from lightning_scar.storage.places import Copies
from lightning_scar.storage.store import rank_folder

_FILE = "address.json"
#: Seconds after which a host that could not be reached is tried again, and addresses are read again.
_RETRY_SECONDS = 5.0
#: Seconds that closing may take.
_CLOSE_SECONDS = 10.0
_TIMEOUT = 10.0


class Address(NamedTuple):
    """Where a rank receives copies.

    Attributes:
        rank: The rank.
        memory: The name of its host's memory, the same for all ranks of the host.
        host: The address that it listens at.
        port: The port.

    """

    rank: int
    memory: str
    host: str
    port: int


class Addresses:
    """The addresses of all ranks of one start, in the directory: a replacement writes its own over the old one.

    Args:
        directory: The running checkpoint's.
        token: Of the run's lease; addresses of other starts do not count.

    Example::

        >>> addresses = Addresses(Directory("memory://addresses-example"), token="a")
        >>> addresses.write(Address(1, "here", "127.0.0.1", 4711))
        >>> addresses.read(world_size=2)
        [Address(rank=1, memory='here', host='127.0.0.1', port=4711)]

    """

    def __init__(self, directory: Directory, token: str) -> None:
        self._directory = directory
        self._token = token

    def write(self, address: Address) -> None:
        """Write a rank's address over its older one.

        Raises:
            OSError: If it cannot be written.

        """
        self._directory.write(_file(address.rank), [json.dumps([self._token, *address]).encode()])

    def read(self, world_size: int) -> list[Address]:
        """Return the addresses there are, by rank; what cannot be read is left out.

        Args:
            world_size: The number of ranks.

        """
        found = []
        for rank in range(world_size):
            with suppress(OSError, ValueError):
                token, *fields = json.loads(self._directory.read(_file(rank)))
                if token == self._token:
                    found.append(Address(*fields))
        return found

    def erase(self, rank: int) -> None:
        """Remove the address of a rank that is done."""
        with suppress(OSError):
            self._directory.delete(_file(rank))


def _file(rank: int) -> str:
    return f"{rank_folder(rank)}/{_FILE}"


class Chain:
    """Keeps copies, on the next hosts, of what one rank has only in memory.

    The hosts are in the order of their first ranks, and the chain begins behind this one. A host that cannot be reached
    is passed over, and the next one brought up to date instead.

    Args:
        memory: This host's memory.
        folders: The folders in it that are the rank's.
        names: Returns the names of the files to copy.
        own: This rank's own address.
        addresses: The addresses of all ranks.
        key: The key of the servers.
        world_size: The number of ranks.
        replicas: The number of hosts to keep a copy on.

    Attributes:
        trouble: Why the last copy failed, if it did.

    """

    def __init__(
        self,
        memory: Directory,
        folders: Sequence[str],
        names: Callable[[], Collection[str]],
        own: Address,
        addresses: Addresses,
        key: bytes,
        world_size: int,
        replicas: int,
    ) -> None:
        self._memory = memory
        self._folders = folders
        self._names = names
        self._own = own
        self._book = addresses
        self._key = key
        self._world_size = world_size
        self._replicas = replicas
        self._links: dict[str, _Link] = {}
        self._addresses: list[Address] = []
        self._looked = float("-inf")
        self._is_short = True
        self._failed: dict[Address, float] = {}
        self._saves = self._acknowledged = 0
        self.trouble: OSError | None = None
        self._news = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scar-chain", daemon=True)
        self._thread.start()

    @property
    def behind(self) -> int:
        """How many saves all copies together lag behind."""
        return self._saves - self._acknowledged

    @property
    def hosts(self) -> list[str]:
        """The memories that hold a copy now."""
        return list(self._links)

    def follow(self) -> None:
        """Bring the copies up to date, in a thread; return at once."""
        self._saves += 1
        self._news.set()

    def close(self) -> None:
        """Bring the copies up to date for the last time, which deletes what storage has, and end the thread."""
        self._closing.set()
        self.follow()
        self._thread.join(_CLOSE_SECONDS)
        for link in list(self._links.values()):
            link.neighbour.cut()

    def _run(self) -> None:
        is_last = False
        while not is_last:
            # A host that was lost may be back, though nothing is saved meanwhile.
            self._news.wait(_RETRY_SECONDS if self.behind else None)
            self._news.clear()
            is_last, saves = self._closing.is_set(), self._saves
            if self._copy():
                self._acknowledged, self.trouble = saves, None
        for link in self._links.values():
            link.neighbour.close()

    def _copy(self) -> bool:
        """Return whether there are as many copies as there should be, all of them up to date."""
        done: list[str] = []
        hosts = self._next_hosts()
        wanted = min(self._replicas, len(hosts))
        for memory, addresses in hosts.items():
            if len(done) < wanted and self._copy_to(memory, addresses):
                done.append(memory)
        for memory in set(self._links) - set(done):
            link = self._links.pop(memory)
            with suppress(OSError):
                if len(done) == self._replicas:
                    Copies(self._memory, link.neighbour, self._folders, set).update()
            link.neighbour.close()
        self._is_short = not hosts or len(done) < wanted
        return not self._is_short

    def _next_hosts(self) -> dict[str, list[Address]]:
        if self._is_short and time.monotonic() - self._looked > _RETRY_SECONDS:
            self._addresses, self._looked = self._book.read(self._world_size), time.monotonic()
        hosts: dict[str, list[Address]] = {}
        for address in self._addresses:
            hosts.setdefault(address.memory, []).append(address)
        order = list(hosts)
        here = order.index(self._own.memory) if self._own.memory in order else len(order)
        ring = [*order[here + 1 :], *order[:here]]
        return {memory: hosts[memory] for memory in ring}

    def _copy_to(self, memory: str, addresses: Sequence[Address]) -> bool:
        if memory in self._links:
            with suppress(ConnectionError):
                return self._update(self._links[memory])
            self._links.pop(memory).neighbour.close()
        for address in addresses:
            if time.monotonic() - self._failed.get(address, float("-inf")) < _RETRY_SECONDS:
                continue
            try:
                self._links[memory] = self._link(address)
                return self._update(self._links[memory])
            except OSError as error:
                self.trouble, self._failed[address] = error, time.monotonic()
                self._links.pop(memory, None)
        return False

    def _link(self, address: Address) -> "_Link":
        neighbour = Neighbour(address.host, address.port, self._key, _TIMEOUT)
        return _Link(neighbour, Copies(self._memory, neighbour, self._folders, self._names))

    def _update(self, link: "_Link") -> bool:
        try:
            link.copies.look()
            with suppress(NoRoomError):
                return link.copies.update()
            # It lags so far behind that old and new files together do not fit.
            link.copies.delete_unwanted()
            return link.copies.update()
        except ConnectionError:
            raise
        except OSError as error:
            # The host is there, but refuses.
            self.trouble = error
            return False


class _Link(NamedTuple):
    """A host that holds a copy."""

    neighbour: Neighbour
    copies: Copies
