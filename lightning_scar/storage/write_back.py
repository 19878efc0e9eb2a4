"""Copying memory to storage in the background: memory is a write-back cache."""

import shutil
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from zlib import crc32

from lightning_scar.storage.host_memory import HostMemory
from lightning_scar.storage.places import Copies, Places, written_order
from lightning_scar.storage.store import is_rank_folder, names_in
from lightning_scar.storage.writer import BackgroundWriter

#: Memory holds at most this many times the rank's share of the state, plus one save.
STATES = 2


class WriteBack:
    """Keeps storage at most some saves behind memory.

    Storage is a running checkpoint by itself at any time: files come in the order in which they were written, and what
    they replace is deleted when all of them are there. What storage has may be deleted from memory for room.

    Args:
        places: Memory and storage.
        memory: The memory.
        folders: The folders that are the rank's.
        names: Returns the names of the rank's files.
        every: Storage is brought up to date at every Nth save.

    Attributes:
        loss: Where somebody has removed files, if they have.

    """

    def __init__(
        self,
        places: Places,
        memory: HostMemory,
        folders: Iterable[str],
        names: Callable[[], Collection[str]],
        every: int,
    ) -> None:
        self.memory = memory
        self.loss: str | None = None
        self._places = places
        self._folders = list(folders)
        self._names = names
        self._every = every
        self._copies = Copies(memory, places.storage, self._folders, names, only_own=True)
        places.stored = self._copies.there
        self._saves = 0
        self._writer = BackgroundWriter()

    def follow(self, is_full: bool, is_urgent: bool = False) -> None:
        """Bring storage up to date after a save if it is due, in a background thread.

        Args:
            is_full: Whether it was a full save. It is in storage when this returns.
            is_urgent: Whether it is due regardless of the number of saves.

        Raises:
            OSError: If a full save cannot be written to storage.

        """
        self._saves += 1
        is_due = self._saves >= self._every or is_urgent or self._places.is_short
        if is_full:
            self.finish()
        elif is_due and not self._writer.depth:
            # Otherwise the update after the next save includes this one.
            self._saves = 0
            self._writer.reserve(wait=True)
            self._writer.submit(self._update)

    def finish(self) -> None:
        """Bring storage up to date now.

        Raises:
            OSError: If it cannot be written to.

        """
        self._writer.drain()
        self._update()

    def _update(self) -> None:
        before = self._copies.nbytes
        try:
            self._copies.update()
        finally:
            self._places.stored_bytes += self._copies.nbytes - before

    def drain(self) -> None:
        """Wait for copies to storage that are under way."""
        self._writer.drain()

    def leave(self, remove: bool) -> None:
        """Stop copying.

        Args:
            remove: Whether to delete what the rank has in memory.

        """
        self._writer.drain()
        if remove:
            for folder in self._folders:
                shutil.rmtree(self.memory.file(folder), ignore_errors=True)
        self.memory.leave()

    def take_errors(self) -> list[Exception]:
        """Return the errors of background copies since the last call; those saves are still in memory."""
        return self._writer.take_errors()

    @property
    def unstored(self) -> set[str]:
        """The names of files that are only in memory."""
        return set(self._names()) - self._places.stored

    def vanished(self) -> set[str]:
        """Return the names of files that somebody has removed from memory and that storage does not have."""
        try:
            gone = self.unstored.difference(self._in_memory())
        except OSError:
            # What cannot be looked at now is left for later.
            return set()
        if gone:
            self.loss = self.memory.path
        return gone

    @property
    def nbytes(self) -> int:
        """Bytes that the rank has in memory."""
        return sum(map(self.memory.bytes_in, self._folders))

    def make_room(self, nbytes: int, state_bytes: int) -> None:
        """Delete from memory what storage has, oldest first, until a file fits.

        Args:
            nbytes: The file's size.
            state_bytes: Bytes of the rank's share of the training state.

        """
        bound = STATES * state_bytes + nbytes
        if self.memory.limit is not None:
            bound = min(bound, self.memory.limit)
        with suppress(OSError):
            excess = max(self.nbytes + nbytes - bound, nbytes - self.memory.free_bytes)
            for name in sorted(self._in_memory(), key=written_order) if excess > 0 else ():
                if name in self._places.stored:
                    excess -= self.memory.fs.size(self.memory.file(name))
                    self.memory.delete(name)
                if excess <= 0:
                    return

    def _in_memory(self) -> list[str]:
        return [name for folder in self._folders for name in names_in(self.memory, folder)]


def bring_in(places: Places, memory: HostMemory, share: int, shares: int) -> set[str]:
    """Copy to storage what earlier starts have left in this host's memory only.

    Args:
        places: Memory and storage.
        memory: The memory.
        share: Which share of the files.
        shares: How many shares there are: the ranks of the host.

    Returns:
        The names of the files that storage did not have.

    Raises:
        OSError: If storage cannot be written to.

    """
    found: set[str] = set()
    for folder in filter(is_rank_folder, memory.names()):
        own = {name for name in names_in(memory, folder) if crc32(name.encode()) % shares == share}
        copies = Copies(memory, places.storage, [folder], own.copy, only_own=True)
        found |= own - copies.there
        copies.update()
        places.stored_bytes += copies.nbytes
    return found


def drop(memory: HostMemory, is_kept: Callable[[str], bool]) -> None:
    """Delete the copies that ranks of other hosts have in memory. Storage has them.

    Args:
        memory: The memory.
        is_kept: Returns whether a rank of this host writes to a folder.

    """
    for folder in filter(is_rank_folder, memory.names()):
        if not is_kept(folder):
            shutil.rmtree(memory.file(folder), ignore_errors=True)
