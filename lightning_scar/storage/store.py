"""The delta store: what the deltas of a directory add up to, read by anyone at any time."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from typing_extensions import override

from lightning_scar.storage.collection import no_collection
from lightning_scar.storage.compaction import WITH_OLDER, Retention
from lightning_scar.storage.delta import SUFFIX, DamagedError, Delta
from lightning_scar.storage.delta_file import read_blocks, read_delta
from lightning_scar.storage.directory import Directory, Tier
from lightning_scar.storage.index import Index, Located, newest_lineage
from lightning_scar.storage.source import Source

_RANK_FOLDER = "rank-"
_READERS = max(2, min(8, os.cpu_count() or 2))
#: Blocks that are not worth a reader of their own.
_SMALLEST_BATCH = 64
#: Bytes that are read before they are checked: many blocks in one request, and still in the processor's cache.
_AT_ONCE = 1 << 21
#: How often a reader lists again when files vanish under it; each time means that a whole compaction came between.
_ATTEMPTS = 20

T = TypeVar("T")


def rank_folder(rank: int) -> str:
    """The folder that a rank writes to, relative to the directory."""
    return f"{_RANK_FOLDER}{rank:04d}"


def rank_of(name: str) -> int:
    """The rank whose folder this is, or whose folder a file lies in.

    Example::

        >>> rank_of("rank-0003/delta-00001-00000000.safetensors")
        3

    """
    return int(name.split("/")[0].removeprefix(_RANK_FOLDER))


class Reading(NamedTuple):
    """One version of a block to read, and what gives the memory for each of its slots when its turn has come."""

    located: Located
    into: Callable[[], Mapping[str, memoryview]]


@dataclass(frozen=True)
class Damage:
    """A place where the bytes on disk are not what was written."""

    file: str
    reason: str
    block: str | None = None
    step: int | None = None

    def __str__(self) -> str:
        what = f"block {self.block} of step {self.step} in {self.file}" if self.block else self.file
        return f"{what}: {self.reason}"


class Store(ABC):
    """Deltas that can be read, wherever they lie.

    Reading needs no lock: deltas are immutable, and whoever meets a vanished file lists again.

    Args:
        directory: The directory of the running checkpoint.
        index: What the deltas add up to.

    Attributes:
        damaged: What the last :meth:`refresh` found damaged.

    """

    def __init__(self, directory: Directory, index: Index) -> None:
        self.directory = directory
        self.index = index
        self.damaged: list[Damage] = []

    @property
    @abstractmethod
    def deltas(self) -> list[Delta]:
        """The intact deltas found by the last :meth:`refresh`, by name."""

    @abstractmethod
    def is_empty(self) -> bool:
        """Whether there is no file of a rank at all."""

    @abstractmethod
    def refresh(self) -> None:
        """Lists what there is and reads the headers that are new.

        Raises:
            NewerFormatError: If a delta was written by a newer version of this library.

        """

    @abstractmethod
    def count(self, lineage: Sequence[int]) -> None:
        """Lets the deltas of some starts of the training make up the running checkpoint, and no others.

        Args:
            lineage: The numbers of the starts, oldest first.

        """

    @abstractmethod
    def folders(self) -> list[str]:
        """The folders of all ranks that ever wrote."""

    def foreign_names(self) -> list[str]:
        """What lies in the directory although it is no running checkpoint."""
        names = self.directory.names()
        ours = any(name.startswith(_RANK_FOLDER) or name == "lease.json" for name in names)
        return [] if ours else names

    def missing_folders(self) -> list[str]:
        """The folders of ranks of the newest start of which no intact delta is left."""
        world_size = max((head.world_size for head in self.index.heads.values()), default=0)
        present = {rank_of(delta.name) for delta in self.deltas}
        return [rank_folder(rank) for rank in range(world_size) if rank not in present]

    def read(self, readings: Sequence[Reading]) -> list[tuple[Reading, Damage]]:
        """Reads blocks into ready memory, in parallel, and verifies every checksum.

        Args:
            readings: What to read and where to.

        Returns:
            The readings that found damage; their memory holds garbage.

        Raises:
            FileNotFoundError: If a compaction has replaced a file; :meth:`refresh` and ask again.

        """
        by_file: dict[tuple[Directory, str], list[Reading]] = {}
        for reading in readings:
            # Two hosts may have the same file under the same path.
            delta = reading.located.delta
            by_file.setdefault((delta.directory, delta.name), []).append(reading)
        with ThreadPoolExecutor(_READERS) as pool:
            batches = [
                pool.submit(self._read_batch, batch)
                for found in by_file.values()
                for batch in _shared_out(sorted(found, key=lambda reading: reading.located.block.place))
            ]
            return [damage for batch in batches for damage in batch.result()]

    def _read_batch(self, batch: list[Reading]) -> list[tuple[Reading, Damage]]:
        delta = batch[0].located.delta
        try:
            with delta.directory.source(delta.name) as source:
                source.expect(reading.located.block.extent for reading in batch)
                return [damage for stretch in _stretches(batch) for damage in _read_stretch(source, stretch)]
        except (ConnectionError, FileNotFoundError) as error:
            if delta.directory.tier is not Tier.NEIGHBOUR:
                raise
            # What another host had may be elsewhere, too. Without storage there is nothing.
            return [(reading, _damage(reading, error)) for reading in batch]

    def verify(self) -> list[Damage]:
        """Reads everything that counts and checks it.

        Returns:
            Every damaged header and every damaged version of a block that is kept.

        """

        def check() -> list[Damage]:
            self.refresh()
            found = []
            for delta in self.deltas:
                readings = [Reading(Located(delta, block), block.new_memory) for block in self.index.live(delta)]
                found += [damage for _, damage in self.read(readings)]
            return self.damaged + found

        return retry_vanished(check)


class DeltaStore(Store):
    """All deltas below one directory.

    Args:
        url: The directory, any fsspec URL.
        storage_options: Passed to the file system.
        tier: How near it is.
        retention: How much of the past is kept in it.

    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        storage_options: dict[str, Any] | None = None,
        tier: Tier = Tier.STORAGE,
        retention: Retention = WITH_OLDER,
    ) -> None:
        super().__init__(Directory(url, storage_options, tier), Index(()))
        self.retention = retention
        self._deltas: dict[str, Delta] = {}

    @property
    @override
    def deltas(self) -> list[Delta]:
        # A copy: another thread may be about to delete one.
        return [delta for _, delta in sorted(self._deltas.copy().items(), key=lambda item: item[0])]

    @override
    def is_empty(self) -> bool:
        return not self._names()

    @override
    def refresh(self) -> None:
        self.damaged = []
        with no_collection():
            self._deltas = retry_vanished(self._read_headers)
            self.count(newest_lineage(self._deltas.values()))

    @override
    def count(self, lineage: Sequence[int]) -> None:
        self.index = Index(lineage, self._deltas.values(), self.retention.older)

    def forget_vanished(self, folder: str) -> set[str]:
        """Forgets the deltas of a rank that somebody else has removed.

        Args:
            folder: The rank's.

        Returns:
            The keys of the blocks for whose sake they were kept.

        """
        there = {f"{folder}/{name}" for name in self.directory.child(folder).names()}
        vanished = [delta for delta in self.deltas if delta.name.startswith(f"{folder}/") and delta.name not in there]
        keys = {block.key for delta in vanished for block in self.index.live(delta)}
        for delta in vanished:
            del self._deltas[delta.name]
        if vanished:
            self.count(self.index.lineage)
        return keys

    @override
    def folders(self) -> list[str]:
        return [name for name in self.directory.names() if name.startswith(_RANK_FOLDER)]

    def _names(self) -> list[str]:
        return [
            f"{folder}/{name}"
            for folder in self.folders()
            for name in self.directory.child(folder).names()
            if name.endswith(SUFFIX)
        ]

    def _read_headers(self) -> dict[str, Delta]:
        def header(name: str) -> Delta | Damage:
            try:
                return self._deltas.get(name) or read_delta(self.directory, name)
            except DamagedError as error:
                return Damage(self.directory.file(name), str(error))

        names = self._names()
        with ThreadPoolExecutor(_READERS) as pool:
            found = dict(zip(names, pool.map(header, names), strict=True))
        self.damaged = [damage for damage in found.values() if isinstance(damage, Damage)]
        return {name: delta for name, delta in found.items() if isinstance(delta, Delta)}


def _stretches(batch: Iterable[Reading]) -> Iterator[list[Reading]]:
    """Cuts a list into stretches that are read before they are checked."""
    stretch: list[Reading] = []
    nbytes = 0
    for reading in batch:
        if stretch and nbytes + reading.located.block.nbytes > _AT_ONCE:
            yield stretch
            stretch, nbytes = [], 0
        stretch.append(reading)
        nbytes += reading.located.block.nbytes
    yield stretch


def _read_stretch(source: Source, stretch: Sequence[Reading]) -> list[tuple[Reading, Damage]]:
    """Reads blocks of one file together, and one by one if something is wrong with any of them."""
    try:
        read_blocks(source, [(reading.located.block, reading.into()) for reading in stretch])
    except FileNotFoundError:
        raise
    except (DamagedError, OSError) as error:
        if len(stretch) > 1:
            return [damage for reading in stretch for damage in _read_stretch(source, [reading])]
        return [(stretch[0], _damage(stretch[0], error))]
    return []


def _damage(reading: Reading, error: Exception) -> Damage:
    delta, block = reading.located
    return Damage(delta.file, str(error), block.key, block.version.step)


def _shared_out(items: list[T]) -> list[list[T]]:
    """Cuts a list into stretches, so that one large file does not keep a single reader busy."""
    size = max(_SMALLEST_BATCH, -(-len(items) // _READERS))
    return [items[i : i + size] for i in range(0, len(items), size)]


def retry_vanished(read: Callable[[], T]) -> T:
    """Calls ``read`` again when a file that it was about to read has been replaced by a compaction.

    Raises:
        FileNotFoundError: If files keep vanishing.

    """
    for _ in range(_ATTEMPTS - 1):
        with suppress(FileNotFoundError):
            return read()
    return read()
