"""What a rank has in memory, copied to the memory of the hosts that come next, beside the training.

Chain replication (van Renesse and Schneider, OSDI 2004) as far as a running checkpoint needs it: files are immutable,
and any newest version will do, so a copy is a folder that follows another one, file by file in their order, each
acknowledged. Whatever a slow network does not carry in time is superseded and never sent.
"""

import threading
import time
from collections.abc import Container, Sequence
from contextlib import suppress
from pathlib import Path

from lightning_scar.storage.address_book import AddressBook, Entry
from lightning_scar.storage.delta import SUFFIX
from lightning_scar.storage.folder_client import FolderClient
from lightning_scar.storage.folder_protocol import NoRoomError

#: Seconds after which a host that could not be reached is tried again, and the address book read again.
_RETRY_SECONDS = 5.0
#: Seconds that the end may take.
_FAREWELL_SECONDS = 10.0
_TIMEOUT = 10.0
#: How often in a row files may be merged away while they are copied.
_ATTEMPTS = 5


class Chain:
    """Keeps copies of one folder on the next hosts.

    The hosts are in the order of their first ranks, and the chain begins behind this one. A host that cannot be reached
    is passed over, and the next one brought up to date instead.

    Args:
        folder: The folder of the rank in this host's memory.
        name: What it is called in the folder that each host serves.
        own: This rank's own entry in the address book.
        book: The address book.
        key: That of the servers.
        world_size: The number of ranks.
        replicas: On how many hosts to keep a copy.

    """

    def __init__(
        self, folder: Path, name: str, own: Entry, book: AddressBook, key: bytes, world_size: int, replicas: int
    ) -> None:
        self._folder = folder
        self._name = name
        self._own = own
        self._book = book
        self._key = key
        self._world_size = world_size
        self._replicas = replicas
        self._copies: dict[str, _Copy] = {}
        self._entries: list[Entry] = []
        self._looked = float("-inf")
        self._is_short = True
        self._failed: dict[Entry, float] = {}
        self._saves = self._acknowledged = 0
        #: Why the last copy did not succeed, if so.
        self.trouble: OSError | None = None
        self._news = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scar-chain", daemon=True)
        self._thread.start()

    @property
    def behind(self) -> int:
        """How many saves all copies together lag behind."""
        return self._saves - self._acknowledged

    @property
    def hosts(self) -> list[str]:
        """The memories that hold a copy now."""
        return list(self._copies)

    def follow(self) -> None:
        """Brings the copies up to date, in a thread; returns at once."""
        self._saves += 1
        self._news.set()

    def close(self, remove: bool) -> None:
        """Ends the thread.

        Args:
            remove: Whether the copies are not needed any more.

        """
        self._ending.set()
        self._news.set()
        self._thread.join(_FAREWELL_SECONDS)
        is_stuck = self._thread.is_alive()
        for copy in list(self._copies.values()):
            with suppress(OSError):
                # Two threads cannot speak on one connection.
                copy.hang_up() if is_stuck else copy.end(remove)

    def _run(self) -> None:
        while not self._ending.is_set():
            # A host that was lost may be back, though nothing is saved meanwhile.
            self._news.wait(_RETRY_SECONDS if self.behind else None)
            self._news.clear()
            wanted = self._saves
            if not self._ending.is_set() and self._copy():
                self._acknowledged, self.trouble = wanted, None

    def _copy(self) -> bool:
        """Whether there are as many copies as there should be, all of them up to date."""
        done: list[str] = []
        hosts = self._next_hosts()
        wanted = min(self._replicas, len(hosts))
        for memory, entries in hosts.items():
            if len(done) < wanted and self._copy_to(memory, entries):
                done.append(memory)
        for memory in set(self._copies) - set(done):
            with suppress(OSError):
                self._copies.pop(memory).end(remove=len(done) == self._replicas)
        self._is_short = not hosts or len(done) < wanted
        return not self._is_short

    def _next_hosts(self) -> dict[str, list[Entry]]:
        if self._is_short and time.monotonic() - self._looked > _RETRY_SECONDS:
            self._entries, self._looked = self._book.read(self._world_size), time.monotonic()
        hosts: dict[str, list[Entry]] = {}
        for entry in self._entries:
            hosts.setdefault(entry.memory, []).extend([entry] if entry.port else [])
        order = list(hosts)
        here = order.index(self._own.memory) if self._own.memory in order else len(order)
        ring = [*order[here + 1 :], *order[:here]]
        return {memory: hosts[memory] for memory in ring}

    def _copy_to(self, memory: str, entries: Sequence[Entry]) -> bool:
        if memory in self._copies:
            with suppress(ConnectionError):
                return self._update(memory, self._copies[memory])
            self._copies.pop(memory)
        for entry in entries:
            if time.monotonic() - self._failed.get(entry, float("-inf")) < _RETRY_SECONDS:
                continue
            try:
                copy = _Copy(FolderClient(entry.host, entry.port, self._key, _TIMEOUT), self._name)
                self._copies[memory] = copy
                return self._update(memory, copy)
            except OSError as error:
                self.trouble, self._failed[entry] = error, time.monotonic()
                self._copies.pop(memory, None)
        return False

    def _update(self, memory: str, copy: "_Copy") -> bool:
        try:
            return copy.follow(self._folder, self._ending)
        except ConnectionError:
            raise
        except OSError as error:
            # It is there, but has no room.
            self.trouble = error
            return False


class _Copy:
    """A folder on another host that follows one on this host."""

    def __init__(self, client: FolderClient, name: str) -> None:
        self._client = client
        self._name = name
        self._there: set[str] = set()

    def follow(self, folder: Path, ending: threading.Event) -> bool:
        """Whether everything is there."""
        # Asked each time: it may have been removed there.
        self._there = self._list()
        for _ in range(_ATTEMPTS):
            here = sorted(folder.glob(f"*{SUFFIX}"), key=_age)
            if not here:
                raise FileNotFoundError(f"{folder} is empty: was it removed? Its copies are kept")
            needed = {path.name for path in here}
            try:
                is_all_there = self._put(here, ending)
            except NoRoomError:
                # It lags so far behind that old and new together are too much.
                self._delete(needed, ending)
                is_all_there = self._put(here, ending)
            # What a file that was merged meanwhile replaces stays until what it was merged into is there.
            if is_all_there:
                self._delete(needed, ending)
                return not ending.is_set()
        return False

    def _list(self) -> set[str]:
        try:
            return {found.name for found in self._client.list(self._name) if found.name.endswith(SUFFIX)}
        except FileNotFoundError:
            return set()

    def _put(self, here: Sequence[Path], ending: threading.Event) -> bool:
        for path in here:
            if path.name in self._there or ending.is_set():
                continue
            try:
                self._client.put(f"{self._name}/{path.name}", path)
            except FileNotFoundError:
                return False
            self._there.add(path.name)
        return True

    def _delete(self, needed: Container[str], ending: threading.Event) -> None:
        for name in [name for name in self._there if name not in needed]:
            if not ending.is_set():
                self._client.delete(f"{self._name}/{name}")
                self._there.discard(name)

    def hang_up(self) -> None:
        self._client.close()

    def end(self, remove: bool) -> None:
        with self._client:
            for name in list(self._there) if remove else ():
                self._client.delete(f"{self._name}/{name}")


def _age(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return 0
