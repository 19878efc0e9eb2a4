"""The delta store as one rank writes to it: commit a delta, delete and merge what is no longer needed."""

import os
import warnings
from collections.abc import Collection, Container, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from typing_extensions import override

from lightning_scar.storage.chain import Chain
from lightning_scar.storage.compaction import STATES, Usage, worth_merging
from lightning_scar.storage.copies import Copy, DamagedCopyError, as_sections
from lightning_scar.storage.delta import SUFFIX, Delta, Refresh, Section
from lightning_scar.storage.delta_file import encode
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.head import Head
from lightning_scar.storage.host_memory import HostMemory
from lightning_scar.storage.index import newest_lineage
from lightning_scar.storage.places import Places
from lightning_scar.storage.store import DeltaStore, names_in, rank_folder, rank_of
from lightning_scar.storage.write_back import WriteBack, drop


class RankStore(DeltaStore):
    """The deltas of a directory, for one rank of the one live run.

    A rank writes to its own folder only. It deletes and merges there and in folders of ranks that no longer exist.

    Args:
        url: The directory, any fsspec URL.
        storage_options: Passed to the file system.
        rank: Which rank.
        world_size: The number of ranks.

    Attributes:
        directory: Storage, and this host's memory if there is a :attr:`write_back`.
        write_back: Copies memory to storage; ``None`` without memory.
        chain: Copies the memory to other hosts; ``None`` if there are none.
        host: The name of this host's memory; ``None`` without memory.
        local_ranks: The ranks of this host.
        is_hollow: Whether somebody else has removed files from memory, and no full save has followed.

    """

    directory: Places

    def __init__(
        self,
        url: str | os.PathLike[str],
        storage_options: dict[str, Any] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(Places(Directory(url, storage_options)))
        self.rank = rank
        self.world_size = world_size
        self.write_back: WriteBack | None = None
        self.chain: Chain | None = None
        self.host: str | None = None
        self.local_ranks = {rank}
        self.is_hollow = False
        self._lost: set[str] = set()
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
            # This stays true: no other start runs beside this one.
            self._whole = self.index.lineage
        return self._whole == self.index.lineage

    @property
    def _is_settled(self) -> bool:
        """Whether an older training's files are no longer needed: all ranks have saved since the start."""
        return self.is_whole and len(self.index.heads) == self.world_size

    def sweep(self) -> None:
        """Delete the temporary files that a crash left in this rank's folders."""
        for folder in self.own_folders():
            self.directory.sweep(folder)

    @override
    def _names_in(self, folder: str) -> list[str]:
        # Other ranks' saves count when they are in storage: only then may the files that they replace be deleted.
        return names_in(self.directory if self.is_own(folder) else self.directory.storage, folder)

    def own_folders(self) -> list[str]:
        """Return the folders that this rank writes to or tidies up."""
        return sorted({self.folder, *filter(self.is_own, self.folders())})

    def is_local(self, folder: str) -> bool:
        """Return whether a rank of this host writes to a folder."""
        return rank_of(folder) % self.world_size in self.local_ranks

    def open(self, every: int = 1) -> None:
        """Read the directory and prepare to write, to memory first if the directory has one.

        Args:
            every: With memory, storage is brought up to date at every Nth save.

        """
        self.refresh()
        self.sweep()
        if isinstance(memory := self.directory.memory, HostMemory):
            self.host = memory.name
            self.write_back = WriteBack(self.directory, memory, self.own_folders(), self.own_names, every)

    def drain(self) -> None:
        """Wait for copies to storage that are under way."""
        if self.write_back is not None:
            self.write_back.drain()

    def take_errors(self) -> list[Exception]:
        """Return the errors of background copies since the last call; those saves are still in memory."""
        return self.write_back.take_errors() if self.write_back is not None else []

    @property
    def memory_bytes(self) -> int:
        """Bytes that this rank has in memory."""
        return self.write_back.nbytes if self.write_back is not None else 0

    def bring_to_storage(self) -> None:
        """Copy to storage what only memory has.

        Raises:
            OSError: If it cannot be written to.

        """
        if self.write_back is not None:
            self.look_around()
            self.write_back.finish()

    def drop_copies(self) -> None:
        """Delete the copies that ranks of other hosts have in memory."""
        if self.write_back is not None:
            drop(self.write_back.memory, self.is_local)

    def leave_memory(self, is_stored: bool) -> None:
        """Stop writing to memory.

        Args:
            is_stored: Whether this rank's files there are no longer needed; otherwise they stay for the next start.

        """
        if self.write_back is not None:
            self.write_back.leave(remove=is_stored)
        elif isinstance(self.directory.memory, HostMemory):
            self.directory.memory.leave()

    def look_around(self, others: bool = False) -> None:
        """Take in changes that others have made; what cannot be read now is left for later.

        Args:
            others: Whether to read what other ranks have written and deleted, too; its time grows with their number.

        """
        if self.write_back is not None:
            self._forget_vanished(self.write_back.vanished())
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

    def _forget_vanished(self, names: Collection[str]) -> None:
        gone = [delta for delta in self.own_deltas if delta.name in names]
        if gone:
            self.is_hollow = True
            self._lost |= {block.key for delta in gone for block in self.index.live(delta)}
            for delta in gone:
                self._deltas[delta.folder].pop(delta.name, None)
            self.count(self.index.lineage)

    def take_lost(self) -> set[str]:
        """Return the keys of blocks that somebody else has removed since the last call."""
        lost, self._lost = self._lost, set()
        return lost

    def commit(self, head: Head, sections: Sequence[Section], refreshes: Sequence[Refresh] = ()) -> int:
        """Write one delta, which is part of the running checkpoint when this returns.

        A full save is durable then; without memory every save is. Deltas that are no longer needed are deleted, and
        mostly dead ones are merged.

        Args:
            head: The delta's metadata.
            sections: The blocks, in file order.
            refreshes: The refreshes of the other blocks.

        Returns:
            Bytes of all files written, merged ones included.

        Raises:
            OSError: If the file cannot be written; nothing has changed then.

        """
        delta = self._write(self._new_name("delta", head), head, sections, refreshes)
        self._saves += 1
        if self._depends_on_others(head):
            self.look_around(others=True)
        written = delta.nbytes + self._tidy(head, delta.nbytes)
        if self.write_back is not None:
            self.write_back.follow(is_full=head.kind == "full", is_urgent=self.is_hollow)
        self.is_hollow &= head.kind != "full"
        if self.chain is not None and not self.is_hollow:
            # Other hosts keep what somebody has removed here until a full save has followed.
            self.chain.follow()
        return written

    def _depends_on_others(self, head: Head) -> bool:
        """Return whether other ranks' saves may have made files of this rank obsolete."""
        if not self._is_settled:
            return True
        own = self.own_deltas
        if not any(delta.oldest_incarnation < head.incarnation for delta in own):
            return False
        # Since this start another rank may own blocks in this rank's files. It becomes ever less likely that it has
        # saved them only now, so checks get rarer. More than two versions of a rank's share include others' blocks.
        is_time = self._saves & (self._saves - 1) == 0
        return is_time or sum(map(self.index.live_bytes, own)) > (STATES - 1) * head.state_bytes

    def _new_name(self, kind: str, head: Head) -> str:
        name = f"{self.folder}/{kind}-{head.incarnation:05d}-{head.sequence:08d}"
        # Never overwrite a file.
        again = sum(delta.name.startswith(name) for delta in self.own_deltas)
        return f"{name}-{again:04d}{SUFFIX}" if again else f"{name}{SUFFIX}"

    def _write(self, name: str, head: Head, sections: Sequence[Section], refreshes: Sequence[Refresh] = ()) -> Delta:
        file = encode(head, sections, refreshes)
        if self.write_back is not None:
            self.write_back.make_room(file.nbytes, head.state_bytes)
        delta = file.write(self.directory, name)
        self._take(delta)
        if self.directory.is_short:
            # Only after the file is known to be this rank's: unwanted files are deleted from storage.
            self.directory.stored.add(name)
        if head.lineage != self.index.lineage:
            self.count(head.lineage)
        else:
            self.index.add(delta)
        return delta

    @property
    def own_deltas(self) -> list[Delta]:
        """This rank's deltas."""
        own = [folder for folder in self._deltas.copy() if self.is_own(folder)]
        return [delta for folder in own for delta in self._deltas[folder].copy().values()]

    def own_names(self) -> set[str]:
        """Return the names of this rank's deltas."""
        return {delta.name for delta in self.own_deltas}

    def is_own(self, name: str) -> bool:
        """Return whether this rank deletes and merges in a folder, or in the folder of a file."""
        # Folders of ranks that no longer exist are divided among the present ranks.
        return rank_of(name) % self.world_size == self.rank

    def _tidy(self, head: Head, save_bytes: int) -> int:
        merged_bytes = 0
        refreshing = self._refreshing()
        for delta in self._disposable():
            if not self.index.is_live(delta) and delta.name not in refreshing:
                self._delete(delta)
        while sources := self._mergeable(head, save_bytes, refreshing):
            merged_bytes += self._merge(head, sources)
        return merged_bytes

    def _disposable(self) -> list[Delta]:
        # An older training's files are needed until all ranks have finished their first save.
        is_settled, lineage = self._is_settled, self.index.lineage
        return [delta for delta in self.own_deltas if is_settled or delta.head.incarnation in lineage]

    def _refreshing(self) -> set[str]:
        """Return the files whose refresh counts, by name: each rank's newest, until all have saved since the start."""
        newest: dict[str, Delta] = {}
        for delta in sorted(self._disposable(), key=lambda delta: delta.head.recency):
            is_obsolete = self._is_settled and delta.head.incarnation < self.index.lineage[-1]
            if delta.head.kind != "compacted" and not is_obsolete:
                newest[delta.folder] = delta
        return {delta.name for delta in newest.values() if delta.refreshes}

    def _mergeable(self, head: Head, save_bytes: int, refreshing: Container[str]) -> list[Delta]:
        own = self._disposable()
        usage = [self._usage(delta, head, refreshing) for delta in own]
        return [own[i] for i in worth_merging(usage, head.state_bytes, save_bytes)]

    def _usage(self, delta: Delta, head: Head, refreshing: Container[str]) -> Usage:
        if delta.name in refreshing or delta.name in self._unmergeable:
            return Usage(delta.nbytes, delta.nbytes, may_merge=False)
        live = self.index.live_bytes(delta)
        if live:
            # With their share of the header, which is larger than the data of tiny blocks.
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
        """Split copies into newest and older versions, for two files: a fallback must not be in the damaged file.

        Older versions also die sooner.
        """
        parts: tuple[list[Copy], list[Copy]] = [], []
        for copy in copies:
            parts[self.index.newest(copy.block.key) is not copy.block].append(copy)
        return [part for part in parts if part]

    def _delete(self, delta: Delta) -> None:
        self.directory.delete(delta.name)
        self._deltas[delta.folder].pop(delta.name, None)
        self.index.remove(delta)
