"""Where the ranks of a run can be reached, in its directory: who takes the place of another changes the entry."""

import json
from contextlib import suppress
from typing import NamedTuple

from lightning_scar.storage.directory import Directory
from lightning_scar.storage.store import rank_folder

_FILE = "address.json"


class Entry(NamedTuple):
    """A rank that is not done, and where it serves its host's memory, if it does.

    Attributes:
        rank: The rank.
        memory: The name of its host's memory, the same for all ranks of the host.
        host: The address that it listens at.
        port: The port; 0 if another rank of its host serves.

    """

    rank: int
    memory: str
    host: str
    port: int


class AddressBook:
    """The entries of all ranks of one start.

    Args:
        directory: The running checkpoint's.
        token: Of the run's lease; entries of other starts do not count.

    Example::

        >>> book = AddressBook(Directory("memory://address-book-example"), token="a")
        >>> book.write(Entry(1, "here", "127.0.0.1", 4711))
        >>> book.read(world_size=2)
        [Entry(rank=1, memory='here', host='127.0.0.1', port=4711)]

    """

    def __init__(self, directory: Directory, token: str) -> None:
        self._directory = directory
        self._token = token

    def write(self, entry: Entry) -> None:
        """Enters a rank, over its older entry.

        Raises:
            OSError: If it cannot be written.

        """
        folder = self._directory.child(rank_folder(entry.rank))
        folder.create()
        folder.write(_FILE, [json.dumps([self._token, *entry]).encode()])

    def read(self, world_size: int) -> list[Entry]:
        """The entries there are, by rank; what cannot be read is left out.

        Args:
            world_size: The number of ranks.

        """
        found = []
        for rank in range(world_size):
            with suppress(OSError, ValueError):
                token, *fields = json.loads(self._directory.child(rank_folder(rank)).read(_FILE))
                if token == self._token:
                    found.append(Entry(*fields))
        return found

    def erase(self, rank: int) -> None:
        """Removes the entry of a rank that is done."""
        with suppress(OSError):
            self._directory.child(rank_folder(rank)).delete(_FILE)
