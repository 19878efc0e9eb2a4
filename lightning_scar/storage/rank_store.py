"""The delta store as one rank writes to it: commit a delta, delete and merge what nobody needs any more."""

import os
import warnings
from collections.abc import Container, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from lightning_scar.storage.compaction import WITH_OLDER, Retention, Usage, worth_merging
from lightning_scar.storage.copies import Copy, DamagedCopyError, as_sections
from lightning_scar.storage.delta import SUFFIX, Delta, Refresh, Section
from lightning_scar.storage.delta_file import encode
from lightning_scar.storage.directory import Tier
from lightning_scar.storage.head import Head
from lightning_scar.storage.index import newest_lineage
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
        self._whole: tuple[int, ...] = ()
        self._unmergeable: set[str] = set()
        self._merges = 0
        self._saves = 0

    @property
    def folder(self) -> str:
        """The folder that the rank writes to, relative to the directory."""
        return rank_folder(self.rank)

    @property
    def is_whole(self) -> bool:
        """Whether all ranks have finished their first save, as far as this one knows."""
        if self._whole != self.index.lineage and newest_lineage(self.deltas) == self.index.lineage:
            # For good: no other start begins beside this one.
            self._whole = self.index.lineage
        return self._whole == self.index.lineage

    @property
    def _is_settled(self) -> bool:
        """Whether nothing that an older training left is needed any more: all ranks have saved since the start."""
        return self.is_whole and len(self.index.heads) == self.world_size

    def sweep(self) -> None:
        """Deletes what writes of the rank, and of ranks that are no more, left behind when a crash cut them short."""
        for folder in self.folders():
            if self.is_own(folder):
                self.directory.child(folder).sweep()

    def look_around(self, others: bool = False) -> None:
        """Takes in what has changed behind this rank's back; what cannot be read now is left for later.

        Args:
            others: Whether to look at what the other ranks have written and deleted since, too. That takes the longer
                the more there are.

        """
        if not others or self.world_size == 1:
            return
        with suppress(OSError):
            names = {folder: self._names_in(folder) for folder in self.folders() if not self.is_own(folder)}
            for delta in self.deltas:
                if not self.is_own(delta.folder) and delta.name not in names.get(delta.folder, ()):
                    self.index.remove(self._deltas[delta.folder].pop(delta.name))
            new = [name for found in names.values() for name in found if not self._has(name)]
            for read in self._headers(new):
                if isinstance(read, Delta):
                    self._take(read)
                    self.index.add(read)

    def commit(self, head: Head, sections: Sequence[Section], refreshes: Sequence[Refresh] = ()) -> int:
        """Writes one delta; when this returns, it is durable and part of the running checkpoint.

        Afterwards deltas that nobody needs any more are deleted, and mostly dead ones are merged.

        Args:
            head: What the delta says about itself.
            sections: The blocks, in the order in which they are to lie in the file.
            refreshes: The refresh of blocks that it does not hold exactly.

        Returns:
            Bytes of all files written, merged ones included.

        Raises:
            LimitError: If the file would be too much; nothing has changed then.
            OSError: If the file cannot be written; nothing has changed then.

        """
        delta = self._write(self._new_name("delta", head), head, sections, refreshes)
        self._saves += 1
        if self._depends_on_others(head):
            self.look_around(others=True)
        return delta.nbytes + self._tidy(head, delta.nbytes)

    def _depends_on_others(self, head: Head) -> bool:
        """Whether what others have saved since makes anything of this rank's obsolete."""
        if not self._is_settled:
            return True
        own = self.own_deltas
        if not any(delta.oldest_incarnation < head.incarnation for delta in own):
            return False
        # Another rank may own, since this start, blocks that lie in this one's files. Each time it is less likely to
        # have saved them only now; and more than two versions of what a rank owns are not its own.
        is_time = self._saves & (self._saves - 1) == 0
        return is_time or sum(map(self.index.live_bytes, own)) > (self.retention.states - 1) * head.state_bytes

    def take_over(self, head: Head, sections: Sequence[Section]) -> int:
        """Writes blocks of earlier starts that lie elsewhere; they keep their versions.

        Args:
            head: What the delta says about itself.
            sections: The blocks.

        Returns:
            Bytes written.

        Raises:
            OSError: If the file cannot be written.

        """
        return self._write(self._new_name("taken", head), replace(head, kind="compacted"), sections).nbytes

    def _new_name(self, kind: str, head: Head) -> str:
        name = f"{self.folder}/{kind}-{head.incarnation:05d}-{head.sequence:08d}"
        # Nothing is written over, whoever asks for it.
        again = sum(delta.name.startswith(name) for delta in self.own_deltas)
        return f"{name}-{again:04d}{SUFFIX}" if again else f"{name}{SUFFIX}"

    def _write(self, name: str, head: Head, sections: Sequence[Section], refreshes: Sequence[Refresh] = ()) -> Delta:
        file = encode(head, sections, refreshes)
        self._check_limit(file.nbytes)
        self.directory.child(self.folder).create()
        delta = file.write(self.directory, name)
        self._take(delta)
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
        """Those of this rank."""
        own = [folder for folder in self._deltas.copy() if self.is_own(folder)]
        return [delta for folder in own for delta in self._deltas[folder].copy().values()]

    @property
    def own_bytes(self) -> int:
        """Bytes of all files that are this rank's."""
        return sum(delta.nbytes for delta in self.own_deltas)

    def clear(self) -> None:
        """Deletes all files of this rank, when all that they hold is elsewhere."""
        for delta in self.own_deltas:
            self._delete(delta)
        self.count(self.index.lineage)

    def is_own(self, name: str) -> bool:
        """Whether a folder, or the file in it, is this rank's to delete and merge."""
        # The folders of ranks that are no more are shared out among those that are.
        return rank_of(name) % self.world_size == self.rank

    def _tidy(self, head: Head, save_bytes: int) -> int:
        merged_bytes = 0
        refreshing = self._refreshing()
        for delta in self._disposable():
            if not self.index.is_live(delta) and delta.name not in refreshing:
                self._delete(delta)
        # Without room for a merged file the others stay as they are.
        with suppress(LimitError):
            while sources := self._mergeable(head, save_bytes, refreshing):
                merged_bytes += self._merge(head, sources)
        return merged_bytes

    def _disposable(self) -> list[Delta]:
        # What an older training left is still needed as long as not all ranks have finished their first save.
        is_settled, lineage = self._is_settled, self.index.lineage
        return [delta for delta in self.own_deltas if is_settled or delta.head.incarnation in lineage]

    def _refreshing(self) -> set[str]:
        """The files whose refresh counts, by name: each rank's newest, until all have saved since the start."""
        newest: dict[str, Delta] = {}
        for delta in sorted(self._disposable(), key=lambda delta: delta.head.recency):
            is_obsolete = self._is_settled and delta.head.incarnation < self.index.lineage[-1]
            if delta.head.kind != "compacted" and not is_obsolete:
                newest[delta.folder] = delta
        return {delta.name for delta in newest.values() if delta.refreshes}

    def _mergeable(self, head: Head, save_bytes: int, refreshing: Container[str]) -> list[Delta]:
        own = self._disposable()
        usage = [self._usage(delta, head, refreshing) for delta in own]
        return [own[i] for i in worth_merging(usage, head.state_bytes, save_bytes, self.retention.states)]

    def _usage(self, delta: Delta, head: Head, refreshing: Container[str]) -> Usage:
        if delta.name in refreshing or delta.name in self._unmergeable:
            return Usage(delta.nbytes, delta.nbytes, may_merge=False)
        live = self.index.live_bytes(delta)
        if live:
            # With their share of the header, which outweighs the data of tiny blocks.
            header = delta.nbytes - delta.block_bytes - delta.refresh_bytes
            live += header * live // delta.block_bytes
        is_of_this_start = delta.head.incarnation == head.incarnation
        age = head.sequence - delta.head.sequence if is_of_this_start else head.sequence
        return Usage(delta.nbytes, live, self.index.newest_share(delta), age)

    def _merge(self, head: Head, sources: list[Delta]) -> int:
        written = 0
        try:
            with ExitStack() as files:
                copies = [
                    Copy(delta, block, source)
                    for delta in sources
                    for source in [files.enter_context(self.directory.source(delta.name))]
                    for block in self.index.live(delta)
                ]
                for together in self._apart(copies):
                    name = f"{self.folder}/merged-{head.incarnation:05d}-{head.sequence:08d}-{self._merges:04d}{SUFFIX}"
                    self._merges += 1
                    written += self._write(name, replace(head, kind="compacted"), as_sections(together)).nbytes
        except DamagedCopyError as error:
            # What cannot be read cannot be copied. The file stays as it is, and readers report the damage.
            self._unmergeable.add(error.copy.delta.name)
            warnings.warn(f"lightning-scar leaves damaged deltas out of the compaction: {error}", stacklevel=2)
            return written
        for delta in sources:
            self._delete(delta)
        return written

    def _apart(self, copies: Sequence[Copy]) -> list[list[Copy]]:
        """A file for newest versions and one for older ones: no block falls back on the file it falls back from.

        Besides, what is older dies sooner.
        """
        parts: tuple[list[Copy], list[Copy]] = [], []
        for copy in copies:
            parts[self.index.newest(copy.block.key) is not copy.block].append(copy)
        return [part for part in parts if part]

    def _delete(self, delta: Delta) -> None:
        self.directory.delete(delta.name)
        self._deltas[delta.folder].pop(delta.name, None)
        self.index.remove(delta)
