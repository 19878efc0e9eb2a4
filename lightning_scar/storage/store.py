"""The delta store: what the deltas of a directory add up to, readable at any time."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from lightning_scar.storage.delta import SUFFIX, DamagedError, Delta, StoredRefresh
from lightning_scar.storage.delta_file import read_delta
from lightning_scar.storage.directory import Directory, Place
from lightning_scar.storage.garbage import no_garbage_collection
from lightning_scar.storage.index import Index, Located, newest_lineage
from lightning_scar.storage.reading import READERS, Damage, Reading, fill, read_refreshes

_RANK_FOLDER = re.compile(r"rank-(\d{4}|[1-9]\d{4,})")
#: Attempts of a reader whose files vanish; each takes another compaction in between.
_ATTEMPTS = 20

T = TypeVar("T")


def rank_folder(rank: int) -> str:
    """Return the folder that a rank writes to, relative to the directory."""
    return f"rank-{rank:04d}"


def rank_of(name: str) -> int:
    """Return the rank of a folder, or of a file in it.

    Example::

        >>> rank_of("rank-0003/delta-00001-00000000.safetensors")
        3

    """
    return int(name.partition("/")[0].removeprefix("rank-"))


def is_rank_folder(name: str) -> bool:
    """Return whether it is a rank's folder; a user's copy of one, ``rank-0000.bak``, is not."""
    return _RANK_FOLDER.fullmatch(name) is not None


class DeltaStore:
    """What the deltas of a directory add up to.

    Reading needs no lock: deltas are immutable, and a reader whose file has vanished lists again.

    Args:
        directory: The directory, or its fsspec URL.
        storage_options: Passed to the file system.

    Attributes:
        directory: The directory.
        index: Which version of each block counts.
        damaged: What the last :meth:`refresh` found damaged.

    """

    def __init__(
        self, directory: Directory | str | os.PathLike[str], storage_options: dict[str, Any] | None = None
    ) -> None:
        self.directory = directory if isinstance(directory, Directory) else Directory(directory, storage_options)
        self.index = Index(())
        self.damaged: list[Damage] = []
        #: By folder and by name.
        self._deltas: dict[str, dict[str, Delta]] = {}

    @property
    def deltas(self) -> list[Delta]:
        """The intact deltas found by the last :meth:`refresh`, by name."""
        # Copies: another thread may be about to delete one.
        found = [delta for folder in self._deltas.copy().values() for delta in folder.copy().values()]
        return sorted(found, key=lambda delta: delta.name)

    def is_empty(self) -> bool:
        """Return whether no rank has any file."""
        return not any(map(self._names_in, self.folders()))

    def refresh(self) -> None:
        """List the directory and read new headers.

        Raises:
            NewerFormatError: If a delta was written by a newer version of this library.

        """
        with no_garbage_collection():
            retry_vanished(self._read_headers)
            self.count(newest_lineage(self.deltas))

    def count(self, lineage: Sequence[int]) -> None:
        """Let only the deltas of some incarnations make up the running checkpoint.

        Args:
            lineage: The incarnations, oldest first.

        """
        self.index = Index(lineage, self.deltas)

    def folders(self) -> list[str]:
        """Return the folders of all ranks that ever wrote."""
        return list(filter(is_rank_folder, self.directory.names()))

    def foreign_names(self) -> list[str]:
        """Return the names in a directory that is not a running checkpoint."""
        names = self.directory.names()
        ours = any(is_rank_folder(name) or name == "lease.json" for name in names)
        return [] if ours else names

    def missing_folders(self) -> list[str]:
        """Return the folders of the newest start's ranks that have no intact delta."""
        world_size = max((head.world_size for head in self.index.heads.values()), default=0)
        present = {rank_of(delta.name) for delta in self.deltas}
        return [rank_folder(rank) for rank in range(world_size) if rank not in present]

    def verify(self) -> list[Damage]:
        """Read and verify everything that counts.

        Returns:
            Every damaged header, kept version of a block, and newest refresh.

        """

        def check() -> list[Damage]:
            self.refresh()
            found = []
            refreshes: dict[tuple[str, str], tuple[Delta, StoredRefresh]] = {}
            for delta in self.deltas:
                live = self.index.live(delta)
                found += [damage for _, damage in fill([Reading(Located(delta, b), b.new_memory) for b in live])]
                newest = (refreshed for block in live for refreshed in self.index.refreshes(block)[:1])
                refreshes.update({(at.delta.file, at.refresh.group): (at.delta, at.refresh) for at in newest})
            read = read_refreshes(list(refreshes.values()))
            return self.damaged + found + [damage for damage in read if isinstance(damage, Damage)]

        return retry_vanished(check)

    def _take(self, delta: Delta) -> None:
        self._deltas.setdefault(delta.folder, {})[delta.name] = delta

    def _has(self, name: str) -> bool:
        return name in self._deltas.get(name.partition("/")[0], ())

    def _names_in(self, folder: str) -> list[str]:
        return names_in(self.directory, folder)

    def _read_headers(self) -> None:
        names = dict.fromkeys(name for folder in self.folders() for name in self._names_in(folder))
        known = [delta for delta in self.deltas if delta.name in names]
        found = list(self._headers(name for name in names if not self._has(name)))
        for error in found:
            if isinstance(error, OSError):
                raise error
        deltas: dict[str, dict[str, Delta]] = {}
        for delta in (*known, *found):
            if isinstance(delta, Delta):
                deltas.setdefault(delta.folder, {})[delta.name] = delta
        # At once: another thread may ask meanwhile what is still needed.
        self._deltas = deltas
        self.damaged = [damage for damage in found if isinstance(damage, Damage)]

    def _headers(self, names: Iterable[str]) -> Iterator[Delta | Damage | OSError]:
        """Read headers in parallel; yield each delta, or why it cannot be read."""

        def header(name: str) -> Delta | Damage | OSError:
            try:
                return read_delta(self.directory, name)
            except DamagedError as error:
                return Damage(self.directory.file(name), str(error))
            except OSError as error:
                return error

        with ThreadPoolExecutor(READERS) as pool:
            yield from pool.map(header, names)


def names_in(place: Place, folder: str) -> list[str]:
    """Return the names of the deltas in a folder, with the folder."""
    return [f"{folder}/{name}" for name in place.names(folder) if name.endswith(SUFFIX)]


def retry_vanished(read: Callable[[], T]) -> T:
    """Call ``read``, and again when a compaction has replaced a file that it needs.

    Raises:
        FileNotFoundError: If files keep vanishing.

    """
    for _ in range(_ATTEMPTS - 1):
        with suppress(FileNotFoundError):
            return read()
    return read()
