"""The running checkpoint as one rank writes to it: to memory at every save, to storage at some of them."""

import os
import socket
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from lightning_scar.storage.chain import Chain
from lightning_scar.storage.delta import Delta, Refresh, Section
from lightning_scar.storage.head import Head
from lightning_scar.storage.host_memory import HostMemory, left_in_memory
from lightning_scar.storage.inheritance import Inheritance
from lightning_scar.storage.memory_store import MemoryStore
from lightning_scar.storage.rank_store import RankStore
from lightning_scar.storage.spill import Newer, Spill
from lightning_scar.storage.store import DeltaStore, rank_folder
from lightning_scar.storage.tiers import TieredStore
from lightning_scar.storage.writer import BackgroundWriter

#: How long a rank that is done waits for others.
FAREWELL_SECONDS = 10.0


class TieredRankStore(TieredStore):
    """The tiers of a running checkpoint, for one rank of the one live run.

    Every save goes to memory. Every Nth brings to storage, in a thread of its own, whatever is newer in memory;
    a full save brings it there before it counts as done. So storage alone always holds a running checkpoint, which
    lags behind by as many saves. Without memory all saves go to storage, and so does one that finds no room there,
    with all that memory has: from the next one on memory begins anew.

    What a dead start has left in memory is read, too, until all ranks have saved everything anew.

    Args:
        url: The directory, any fsspec URL.
        storage_options: Passed to the file system.
        rank: Which rank.
        world_size: The number of ranks.
        every: Every Nth save goes to storage; ``None`` for no memory.
        limit: Bytes that this rank may take of memory; ``None`` for what there is.

    Attributes:
        storage: The storage.
        memory: The memory; ``None`` without it.
        host: A name of this host's memory, for the other ranks; ``None`` if it has none of this run.
        chain: Copies the memory to other hosts; ``None`` if there are none.
        local_ranks: The ranks of this host.
        follows_nobody: Whether nothing that earlier starts have left in memory is needed any more.
        trouble: Why a save could not go to memory, if so. Such saves go to storage instead.

    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        storage_options: dict[str, Any] | None = None,
        rank: int = 0,
        world_size: int = 1,
        every: int | None = None,
        limit: int | None = None,
    ) -> None:
        self.storage = RankStore(url, storage_options, rank, world_size)
        self.memory: MemoryStore | None = None
        self.host: str | None = None
        self.chain: Chain | None = None
        self.local_ranks = {rank}
        self.follows_nobody = False
        self.trouble: OSError | None = None
        self._every = every
        self._limit = limit
        self._host: HostMemory | None = None
        self._inheritance: Inheritance | None = None
        self._spill = Spill(self.storage)
        self._newest: Head | None = None
        self._stored: Head | None = None
        self._unstored = 0
        self._writer = BackgroundWriter()
        super().__init__([self.storage])

    def enter(self, token: str, previous: Sequence[str] = ()) -> None:
        """Begins to write.

        Args:
            token: That of the run's lease.
            previous: Those of the starts before that it follows, the newest first.

        Raises:
            OSError: If there is no memory, or storage cannot be written to.

        """
        self.storage.sweep()
        if not self.has_memory and not left_in_memory(self.directory, previous):
            return
        self._host = HostMemory(self.directory, token, previous)
        self.host = f"{socket.gethostname()}-{self._host.device}:{self._host.path}"
        self._inheritance = Inheritance(self._host)
        if self.has_memory:
            self.memory = MemoryStore(self._host, self.storage.rank, self.storage.world_size, self._limit)
            self.memory.sweep()
        self.see([])

    @property
    def has_memory(self) -> bool:
        """Whether saves go to memory first."""
        return self._every is not None

    @property
    def memory_folders(self) -> list[Path]:
        """This host's folders of the run, the newest first."""
        return [] if self._host is None else [self._host.path, *self._host.inherited]

    # -- reading -------------------------------------------------------------------------------------------------

    def see(self, neighbours: Sequence[DeltaStore], own: bool = True) -> None:
        """Reads what other hosts have in memory, too.

        Args:
            neighbours: That, instead of what was seen before; listed already.
            own: Whether to read this host's memory.

        """
        here = [self.memory] if self.memory is not None else []
        inherited = self._inheritance.stores if self._inheritance is not None else []
        self.listed = neighbours
        self.stores = [*((*here, *inherited) if own else ()), *neighbours, self.storage]

    @property
    def is_whole(self) -> bool:
        """Whether all ranks have finished their first save in storage, as far as this one knows."""
        return self.storage.is_whole

    def look_around(self, others: bool = False) -> None:
        """Takes in what was removed from memory; what cannot be read now is left for later.

        Args:
            others: Whether to look at what the other ranks have written and deleted since, too.

        """
        if self.memory is not None:
            self.memory.look_around(others)
        if self._inheritance is not None:
            self._inheritance.look_around()
        if not self._writer.depth:
            self.storage.look_around(others)

    def take_lost(self) -> set[str]:
        """The keys of blocks that were removed from memory, or damaged there, since the last call."""
        return self._spill.take_left_out() | (self.memory.take_lost() if self.memory is not None else set())

    @property
    def is_hollow(self) -> bool:
        """Whether somebody has removed files from memory, and no full save has followed."""
        return self.memory is not None and self.memory.is_hollow

    # -- a save --------------------------------------------------------------------------------------------------

    def commit(self, head: Head, sections: Sequence[Section], refreshes: Sequence[Refresh] = ()) -> None:
        """Writes one delta; when this returns, it is part of the running checkpoint, a full one durably so.

        Args:
            head: What the delta says about itself.
            sections: The blocks, in the order in which they are to lie in the file.
            refreshes: The refresh of blocks that it does not hold exactly.

        Raises:
            OSError: If it cannot be written.

        """
        if self.memory is None:
            self._store(head, Newer(), sections, refreshes)
        elif not self._commit_to_memory(self.memory, head, sections, refreshes):
            self._writer.drain()
            self._commit_to_storage(self.memory, head, sections, refreshes)
        elif head.kind == "full":
            self._writer.drain()
            self._store_newer(head)
            self.memory.is_hollow = False
        elif self._is_due(head) and not self._writer.depth:
            # Else the next one brings along what this one would have.
            self._store_newer_beside(head)

    def _commit_to_memory(
        self, memory: MemoryStore, head: Head, sections: Sequence[Section], refreshes: Sequence[Refresh]
    ) -> bool:
        if memory.is_hollow and head.kind != "full":
            # The copies on other hosts follow the memory: what was lost here they keep until it is whole again.
            return False
        try:
            memory.commit(head, sections, refreshes)
        except OSError as error:
            self.trouble = error
            return False
        self._newest = head
        self._unstored += 1
        if self.chain is not None:
            self.chain.follow()
        return True

    def _commit_to_storage(
        self, memory: MemoryStore, head: Head, sections: Sequence[Section], refreshes: Sequence[Refresh]
    ) -> None:
        """In one file with all that memory has newer, so that memory can begin anew."""
        keys = {key for section in sections for key in section.keys}
        with ExitStack() as files:
            # Its refresh is not needed any more.
            copies = [copy for copy in self._newer_in_memory(files).copies if copy.block.key not in keys]
            self._store(head, Newer(copies), sections, refreshes)
        memory.clear()
        memory.is_hollow &= head.kind != "full"

    def _is_due(self, head: Head) -> bool:
        assert self._every is not None
        stored = self.storage.index.heads.get(self.storage.rank)
        is_first = stored is None or stored.incarnation != head.incarnation
        return is_first or self._unstored >= self._every

    def _store_newer_beside(self, head: Head) -> None:
        with ExitStack() as opened:
            newer = self._newer_in_memory(opened)
            files = opened.pop_all()
        self._unstored = 0
        self._writer.reserve(wait=True)
        self._writer.submit(partial(self._store_and_close, head, newer, files))

    def _store_and_close(self, head: Head, newer: Newer, files: ExitStack) -> None:
        with files:
            self._store(head, newer)

    def _store_newer(self, head: Head) -> None:
        with ExitStack() as files:
            newer = self._newer_in_memory(files)
            if newer.copies:
                self._store(head, newer)

    def _newer_in_memory(self, files: ExitStack) -> Newer:
        return Newer() if self.memory is None else self._spill.newer(self.memory, self.memory.own_deltas, files)

    def _store(
        self, head: Head, newer: Newer, sections: Sequence[Section] = (), refreshes: Sequence[Refresh] = ()
    ) -> None:
        self._spill.store(head, newer, sections, refreshes)
        self._stored = head
        self._forget_inherited()

    def _forget_inherited(self) -> None:
        """Lets go of what dead starts have left here, once all ranks have saved anew in storage."""
        if self.follows_nobody or self._stored is None:
            return
        heads = self.storage.index.heads.values()
        saved = {head.rank for head in heads if head.incarnation == self._stored.incarnation}
        if saved != set(range(self.storage.world_size)):
            return
        if self._inheritance is not None and self._inheritance.stores:
            if self.is_first_here:
                self._inheritance.bring_to_storage(self._spill, self._stored)
            self._inheritance.forget(remove=self.is_first_here)
            self.see(self.listed)
        self.follows_nobody = True

    @property
    def is_first_here(self) -> bool:
        """Whether this is the one of several ranks on a host that sees to what they share."""
        return self.storage.rank == min(self.local_ranks)

    def forget_obsolete(self, was_read: Collection[Delta]) -> None:
        """Lets go of dead starts that later ones have overtaken in all they had.

        Args:
            was_read: From where the state was restored.

        """
        if self._inheritance is not None:
            self._inheritance.forget_obsolete(self.storage.index, was_read, remove=self.is_first_here)
            self.see(self.listed)

    @property
    def inherited_bytes(self) -> int:
        """Bytes that dead starts have left here, for all ranks of this host."""
        return self._host.inherited_bytes() if self._host is not None else 0

    @property
    def room(self) -> int:
        """Bytes of memory that all ranks of this host may have."""
        return self._host.room if self._host is not None else 0

    # -- the end -------------------------------------------------------------------------------------------------

    @property
    def stored_bytes(self) -> int:
        """Bytes of all files written to storage."""
        return self._spill.nbytes

    @property
    def memory_bytes(self) -> int:
        """Bytes that this rank holds in memory."""
        return self.memory.own_bytes if self.memory is not None else 0

    def take_errors(self) -> list[Exception]:
        """What went wrong beside the training since the last call; those saves are still in memory."""
        return self._writer.take_errors()

    def drain(self) -> None:
        """Waits for what is on its way to storage."""
        self._writer.drain()

    def bring_to_storage(self) -> None:
        """Brings to storage what memory alone holds.

        Raises:
            Exception: If it cannot be written.

        """
        self.drain()
        if self.memory is not None and self._newest is not None:
            self.memory.look_around()
            self._store_newer(self._newest)

    def wait_for_others(self) -> None:
        """Lets the other ranks of a short run finish their first save, on which depends what a dead start has left."""
        deadline = time.monotonic() + FAREWELL_SECONDS
        while self._stored and len(self.memory_folders) > 1 and time.monotonic() < deadline:
            self.storage.look_around(others=True)
            self._forget_inherited()
            time.sleep(0.05)

    def leave_memory(self, remove: bool, with_copies: bool = True) -> None:
        """Ends writing to memory.

        Args:
            remove: Whether what this rank wrote there is not needed any more; else it waits for the next start.
            with_copies: Whether the copies of other hosts' ranks are not needed any more, either.

        """
        self.drain()
        if self._host is None:
            return
        if remove:
            local = {rank_folder(rank) for rank in self.local_ranks}
            self._host.remove(self.storage.folder, lambda folder: folder in local or not with_copies)
        else:
            self._host.leave()
