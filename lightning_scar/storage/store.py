"""The delta store: what the deltas of a directory add up to, and the way a delta gets in and out."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from lightning_scar.storage.collection import no_collection
from lightning_scar.storage.compaction import Usage, worth_merging
from lightning_scar.storage.delta import (
    SUFFIX,
    BlockData,
    DamagedError,
    Delta,
    Entry,
    Head,
    Payload,
    encode,
    read_block,
    read_delta,
    read_entries,
)
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.index import Index, Located, newest_lineage
from lightning_scar.storage.source import Source

_RANK_FOLDER = "rank-"
_READERS = max(2, min(8, os.cpu_count() or 2))
#: Blocks that are not worth a reader of their own.
_SMALLEST_BATCH = 64
#: How often a reader lists again when files vanish under it; each time means that a whole compaction came between.
_ATTEMPTS = 20

T = TypeVar("T")


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


class DeltaStore:
    """All deltas below one directory.

    Reading needs no lock: deltas are immutable, and whoever meets a vanished file lists again.
    Writing is for the one live run of the directory, and each rank writes only below its own folder.

    Args:
        url: The directory, any fsspec URL.
        storage_options: Passed to the file system.
        rank: Whose folder :meth:`commit` writes to.

    """

    def __init__(
        self, url: str | os.PathLike[str], storage_options: dict[str, Any] | None = None, rank: int = 0
    ) -> None:
        self.directory = Directory(url, storage_options)
        self.rank = rank
        self.damaged: list[Damage] = []
        self.index = Index(())
        self._deltas: dict[str, Delta] = {}
        self._unmergeable: set[str] = set()
        self._merges = 0

    @property
    def folder(self) -> str:
        """The folder of the rank that writes, relative to the directory."""
        return f"{_RANK_FOLDER}{self.rank:04d}"

    @property
    def deltas(self) -> list[Delta]:
        """The intact deltas found by the last :meth:`refresh`, by name."""
        return [self._deltas[name] for name in sorted(self._deltas)]

    def is_empty(self) -> bool:
        """Whether the directory holds no file of a rank at all."""
        return not self._names()

    def foreign_names(self) -> list[str]:
        """What lies in the directory although it is no running checkpoint."""
        names = self.directory.names()
        ours = any(name.startswith(_RANK_FOLDER) or name == "owner.json" for name in names)
        return [] if ours else names

    def refresh(self) -> None:
        """Lists the directory and reads the headers that are new.

        Raises:
            NewerFormatError: If a delta was written by a newer version of this library.

        """
        self.damaged = []
        with no_collection():
            self._deltas = retry_vanished(self._read_headers)
            self.index = Index(newest_lineage(self._deltas.values()), self._deltas.values())

    def _names(self) -> list[str]:
        folders = [name for name in self.directory.names() if name.startswith(_RANK_FOLDER)]
        return [
            f"{folder}/{name}"
            for folder in folders
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

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, readings: Sequence[Reading]) -> list[tuple[Reading, Damage]]:
        """Reads blocks into ready memory, in parallel, and verifies every checksum.

        Args:
            readings: What to read and where to.

        Returns:
            The readings that found damage; their memory holds garbage.

        Raises:
            FileNotFoundError: If a compaction has replaced a file; :meth:`refresh` and ask again.

        """
        by_file: dict[str, list[Reading]] = {}
        for reading in readings:
            by_file.setdefault(reading.located.delta.name, []).append(reading)
        with ThreadPoolExecutor(_READERS) as pool:
            batches = [
                pool.submit(self._read_batch, name, batch)
                for name, found in by_file.items()
                for batch in _shared_out(sorted(found, key=lambda reading: reading.located.block.place))
            ]
            return [damage for batch in batches for damage in batch.result()]

    def _read_batch(self, name: str, batch: list[Reading]) -> list[tuple[Reading, Damage]]:
        damages = []
        with self.directory.source(name) as source:
            source.expect(reading.located.block.extent for reading in batch)
            for reading in batch:
                block = reading.located.block
                try:
                    read_block(source, block, reading.into())
                except FileNotFoundError:
                    raise
                except (DamagedError, OSError) as error:
                    damage = Damage(self.directory.file(name), str(error), block.key, block.version.step)
                    damages.append((reading, damage))
        return damages

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

    # -- writing -------------------------------------------------------------------------------------------------

    def commit(self, head: Head, blocks: Sequence[BlockData]) -> int:
        """Writes one delta; when this returns, it is durable and part of the running checkpoint.

        Afterwards deltas that nobody needs any more are deleted, and mostly dead ones are merged.

        Args:
            head: What the delta says about itself.
            blocks: The blocks, in the order in which they are to lie in the file.

        Returns:
            Bytes of all files written, merged ones included.

        Raises:
            OSError: If the file cannot be written; nothing has changed then.

        """
        name = f"{self.folder}/delta-{head.incarnation:05d}-{head.sequence:08d}{SUFFIX}"
        delta = self._write(name, head, blocks)
        return delta.nbytes + self._tidy(head, delta.nbytes)

    def _write(self, name: str, head: Head, blocks: Sequence[BlockData]) -> Delta:
        self.directory.child(self.folder).create()
        self.directory.write(name, encode(head, blocks))
        delta = self._deltas[name] = read_delta(self.directory, name)
        lineage = newest_lineage(self._deltas.values())
        if lineage != self.index.lineage:
            self.index = Index(lineage, self._deltas.values())
        else:
            self.index.add(delta)
        return delta

    def _tidy(self, head: Head, save_bytes: int) -> int:
        merged_bytes = 0
        for delta in self._own():
            if not self.index.live(delta):
                self._delete(delta)
        while sources := self._mergeable(head.state_bytes, save_bytes):
            merged_bytes += self._merge(head, sources)
        return merged_bytes

    def _own(self) -> list[Delta]:
        # Without those of a fresh incarnation that does not count yet: its other ranks have still to save.
        counting = max(self.index.lineage, default=0)
        return [d for d in self.deltas if d.name.startswith(f"{self.folder}/") and d.head.incarnation <= counting]

    def _mergeable(self, state_bytes: int, save_bytes: int) -> list[Delta]:
        own = [delta for delta in self._own() if delta.name not in self._unmergeable]
        usage = [Usage(delta.nbytes, delta.nbytes - self._dead_bytes(delta)) for delta in own]
        return [own[i] for i in worth_merging(usage, state_bytes, save_bytes)]

    def _dead_bytes(self, delta: Delta) -> int:
        live = sum(block.nbytes for block in self.index.live(delta))
        return sum(block.nbytes for block in delta.blocks) - live

    def _merge(self, head: Head, sources: list[Delta]) -> int:
        name = f"{self.folder}/merged-{head.incarnation:05d}-{head.sequence:08d}-{self._merges:04d}{SUFFIX}"
        self._merges += 1
        try:
            with ExitStack() as files:
                blocks = [
                    BlockData(
                        block.key, block.version, {s: self._copied(delta, source, e) for s, e in block.slots.items()}
                    )
                    for delta in sources
                    for source in [files.enter_context(self.directory.source(delta.name))]
                    for block in self.index.live(delta)
                ]
                merged = self._write(name, replace(head, kind="compacted"), blocks)
        except DamagedError as error:
            # What cannot be read cannot be copied. The files stay as they are, and readers report the damage.
            if not self._unmergeable.intersection(delta.name for delta in sources):
                self._unmergeable.update(delta.name for delta in sources)
            warnings.warn(f"lightning-scar leaves damaged deltas out of the compaction: {error}", stacklevel=2)
            return 0
        for delta in sources:
            self._delete(delta)
        return merged.nbytes

    def _copied(self, delta: Delta, source: Source, entry: Entry) -> Payload:
        def data() -> memoryview:
            into = memoryview(bytearray(entry.stop - entry.start))
            try:
                read_entries(source, [(entry, into)])
            except DamagedError as error:
                self._unmergeable.add(delta.name)
                raise DamagedError(f"{self.directory.file(delta.name)}: {error}") from None
            return into

        return Payload(entry.dtype, entry.shape, entry.stop - entry.start, entry.checksum, data)

    def _delete(self, delta: Delta) -> None:
        self.directory.delete(delta.name)
        self._deltas.pop(delta.name, None)


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
