"""The delta store as one rank writes to it: commit a delta, delete and merge what nobody needs any more."""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from lightning_scar.storage.compaction import WITH_OLDER, Retention, Usage, worth_merging
from lightning_scar.storage.delta import (
    SUFFIX,
    BlockData,
    DamagedError,
    Delta,
    Entry,
    Payload,
    StoredBlock,
    encode,
    read_delta,
    read_entries,
)
from lightning_scar.storage.directory import Tier
from lightning_scar.storage.head import Head
from lightning_scar.storage.index import newest_lineage
from lightning_scar.storage.source import Source
from lightning_scar.storage.store import DeltaStore, rank_folder, rank_of


class LimitError(OSError):
    """A file would exceed the limit of a store."""


class RankStore(DeltaStore):
    """The deltas of a directory, for one rank of the one live run.

    A rank writes to its own folder only. It deletes and merges there, and in the folders of ranks that are no more.

    Args:
        url: The directory, any fsspec URL.
        storage_options: Passed to the file system.
        rank: Which rank.
        world_size: The number of ranks.
        tier: How near the directory is.
        retention: How much of the past is kept in it.

    Attributes:
        limit: Bytes that this rank's files may take, all together and at any time; ``None`` for no limit.

    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        storage_options: dict[str, Any] | None = None,
        rank: int = 0,
        world_size: int = 1,
        tier: Tier = Tier.STORAGE,
        retention: Retention = WITH_OLDER,
    ) -> None:
        super().__init__(url, storage_options, tier, retention)
        self.rank = rank
        self.world_size = world_size
        self.limit: int | None = None
        self._unmergeable: set[str] = set()
        self._merges = 0

    @property
    def folder(self) -> str:
        """The folder that the rank writes to, relative to the directory."""
        return rank_folder(self.rank)

    @property
    def is_whole(self) -> bool:
        """Whether all ranks have finished their first save, as far as this one knows."""
        return newest_lineage(self.deltas) == self.index.lineage

    def sweep(self) -> None:
        """Deletes what writes of the rank, and of ranks that are no more, left behind when a crash cut them short."""
        for folder in self.folders():
            if self.is_own(folder):
                self.directory.child(folder).sweep()

    def look_around(self) -> None:
        """Takes in what the other ranks have written and deleted since; what cannot be read now is left for later."""
        if self.world_size == 1:
            return
        with suppress(OSError):
            names = {name for name in self._names() if not self.is_own(name)}
            for name in sorted(names - self._deltas.keys()):
                with suppress(OSError, DamagedError):
                    delta = self._deltas[name] = read_delta(self.directory, name)
                    self.index.add(delta)
            for name in [name for name in self._deltas if not self.is_own(name) and name not in names]:
                self.index.remove(self._deltas.pop(name))

    def commit(self, head: Head, blocks: Sequence[BlockData]) -> int:
        """Writes one delta; when this returns, it is durable and part of the running checkpoint.

        Afterwards deltas that nobody needs any more are deleted, and mostly dead ones are merged.

        Args:
            head: What the delta says about itself.
            blocks: The blocks, in the order in which they are to lie in the file.

        Returns:
            Bytes of all files written, merged ones included.

        Raises:
            LimitError: If the file would be too much; nothing has changed then.
            OSError: If the file cannot be written; nothing has changed then.

        """
        delta = self._write(self._new_name("delta", head), head, blocks)
        self.look_around()
        return delta.nbytes + self._tidy(head, delta.nbytes)

    def take_over(self, head: Head, blocks: Sequence[BlockData]) -> int:
        """Writes blocks of earlier starts that lie elsewhere; they keep their versions.

        Args:
            head: What the delta says about itself.
            blocks: The blocks.

        Returns:
            Bytes written.

        Raises:
            OSError: If the file cannot be written.

        """
        return self._write(self._new_name("taken", head), replace(head, kind="compacted"), blocks).nbytes

    def _new_name(self, kind: str, head: Head) -> str:
        name = f"{self.folder}/{kind}-{head.incarnation:05d}-{head.sequence:08d}"
        # Nothing is written over, whoever asks for it.
        again = sum(other.startswith(name) for other in self._deltas.copy())
        return f"{name}-{again:04d}{SUFFIX}" if again else f"{name}{SUFFIX}"

    def _write(self, name: str, head: Head, blocks: Sequence[BlockData]) -> Delta:
        pieces = encode(head, blocks)
        header = [next(pieces), next(pieces)]
        self._check_limit(sum(map(len, header)) + sum(p.nbytes for block in blocks for p in block.slots.values()))
        self.directory.child(self.folder).create()
        self.directory.write(name, chain(header, pieces))
        delta = self._deltas[name] = read_delta(self.directory, name)
        if head.lineage != self.index.lineage:
            self.count(head.lineage)
        else:
            self.index.add(delta)
        return delta

    def _check_limit(self, nbytes: int) -> None:
        needed = self.own_bytes + nbytes
        if self.limit is not None and needed > self.limit:
            raise LimitError(f"{self.limit} bytes may be taken, and with this file it would be {needed}")

    @property
    def own_deltas(self) -> list[Delta]:
        """Those of this rank, by name."""
        return [delta for delta in self.deltas if self.is_own(delta.name)]

    @property
    def own_bytes(self) -> int:
        """Bytes of all files that are this rank's."""
        return sum(delta.nbytes for delta in self.own_deltas)

    def clear(self) -> None:
        """Deletes all files of this rank, when all that they hold is elsewhere."""
        for delta in self.own_deltas:
            self._delete(delta)
        self.count(self.index.lineage)

    def _tidy(self, head: Head, save_bytes: int) -> int:
        merged_bytes = 0
        for delta in self._own():
            if not self.index.live(delta):
                self._delete(delta)
        # Without room for a merged file the others stay as they are.
        with suppress(LimitError):
            while sources := self._mergeable(head.state_bytes, save_bytes):
                merged_bytes += self._merge(head, sources)
        return merged_bytes

    def _own(self) -> list[Delta]:
        # What an older training left is still needed as long as not all ranks have finished their first save.
        is_whole = self.is_whole and len(self.index.heads) == self.world_size
        return [delta for delta in self.own_deltas if is_whole or delta.head.incarnation in self.index.lineage]

    def is_own(self, name: str) -> bool:
        """Whether a folder, or the file in it, is this rank's to delete and merge."""
        # The folders of ranks that are no more are shared out among those that are.
        return rank_of(name) % self.world_size == self.rank

    def _mergeable(self, state_bytes: int, save_bytes: int) -> list[Delta]:
        own = [delta for delta in self._own() if delta.name not in self._unmergeable]
        usage = [Usage(delta.nbytes, self._live_bytes(delta)) for delta in own]
        return [own[i] for i in worth_merging(usage, state_bytes, save_bytes, self.retention.states)]

    def _live_bytes(self, delta: Delta) -> int:
        live = sum(block.nbytes for block in self.index.live(delta))
        # With their share of the header, which outweighs the data of tiny blocks.
        return delta.nbytes * live // delta.block_bytes

    def _merge(self, head: Head, sources: list[Delta]) -> int:
        name = f"{self.folder}/merged-{head.incarnation:05d}-{head.sequence:08d}-{self._merges:04d}{SUFFIX}"
        self._merges += 1
        try:
            with ExitStack() as files:
                blocks = [
                    copied(delta, source, block, partial(self._unmergeable.add, delta.name))
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

    def _delete(self, delta: Delta) -> None:
        self.directory.delete(delta.name)
        self._deltas.pop(delta.name, None)


def copied(delta: Delta, source: Source, block: StoredBlock, on_damage: Callable[[], object]) -> BlockData:
    """A block on its way from one delta into another one.

    Args:
        delta: Where it is.
        source: That delta's open file.
        block: Which block.
        on_damage: Called before a :class:`~lightning_scar.storage.delta.DamagedError` is raised by reading it.

    """

    def data(entry: Entry) -> memoryview:
        into = memoryview(bytearray(entry.stop - entry.start))
        try:
            read_entries(source, [(entry, into)])
        except DamagedError as error:
            on_damage()
            raise DamagedError(f"{delta.file}: {error}") from None
        return into

    slots = {
        slot: Payload(entry.dtype, entry.shape, entry.stop - entry.start, entry.checksum, partial(data, entry))
        for slot, entry in block.slots.items()
    }
    return BlockData(block.key, block.version, slots)
