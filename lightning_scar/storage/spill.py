"""What memory has newer than storage, on its way there."""

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import starmap

from lightning_scar.storage.copies import Copy, DamagedCopyError, as_sections
from lightning_scar.storage.delta import DamagedError, Delta, Refresh, Section, StoredBlock, StoredRefresh
from lightning_scar.storage.delta_file import read_refresh
from lightning_scar.storage.head import Head
from lightning_scar.storage.rank_store import RankStore
from lightning_scar.storage.source import Source
from lightning_scar.storage.store import DeltaStore


@dataclass(frozen=True)
class Newer:
    """What is newer somewhere than in storage.

    Attributes:
        copies: The blocks.
        refreshes: The newest refresh, and the open files that hold it.

    """

    copies: Sequence[Copy] = ()
    refreshes: Sequence[tuple[Source, StoredRefresh]] = field(default=())


class Spill:
    """Writes to the storage of one rank, in any one thread at a time.

    A block that turns out to be damaged where it comes from is left out, lest it holds up all others for ever.

    Args:
        storage: Where to.

    Attributes:
        nbytes: Bytes written, those of merged files included.

    """

    def __init__(self, storage: RankStore) -> None:
        self._storage = storage
        self._left_out: deque[str] = deque()
        self.nbytes = 0

    def newer(self, store: DeltaStore, deltas: Sequence[Delta], files: ExitStack) -> Newer:
        """What is newer there than in storage.

        Args:
            store: Where it is.
            deltas: In which files of it.
            files: Closes what is opened.

        """
        copies: list[Copy] = []
        refreshes: list[tuple[Source, StoredRefresh]] = []
        saves = [delta for delta in deltas if delta.head.kind != "compacted"]
        newest = max(saves, key=lambda delta: delta.head.recency, default=None)
        for delta in deltas:
            blocks = [block for block in store.index.live(delta) if self._is_newer(block)]
            if blocks:
                source = files.enter_context(store.directory.source(delta.name))
                copies += [Copy(delta, block, source) for block in blocks]
                if delta is newest:
                    refreshes = [(source, refresh) for refresh in delta.refreshes]
        return Newer(copies, refreshes)

    def _is_newer(self, block: StoredBlock) -> bool:
        stored = self._storage.index.newest(block.key)
        return stored is None or stored.version < block.version

    def store(
        self, head: Head, newer: Newer, sections: Sequence[Section] = (), refreshes: Sequence[Refresh] = ()
    ) -> None:
        """Writes a delta of a save.

        Args:
            head: What it says about itself.
            newer: What it takes from elsewhere.
            sections: Other blocks.
            refreshes: Their refresh.

        Raises:
            DamagedError: If a block of a full save is damaged, of which all have to be there.
            OSError: If the file cannot be written.

        """
        refreshes = [*refreshes, *filter(None, starmap(_read, newer.refreshes))]
        self._write(
            lambda copied: self._storage.commit(head, [*sections, *copied], refreshes),
            newer.copies,
            must_be_whole=head.kind == "full",
        )

    def take_over(self, head: Head, copies: Sequence[Copy]) -> None:
        """Writes blocks of dead starts, which keep their versions.

        Raises:
            OSError: If the file cannot be written.

        """
        self._write(lambda copied: self._storage.take_over(head, copied), copies, must_be_whole=False)

    def take_left_out(self) -> set[str]:
        """The keys of the blocks that were left out since the last call."""
        return {self._left_out.popleft() for _ in range(len(self._left_out))}

    def _write(self, write: Callable[[list[Section]], int], copies: Sequence[Copy], must_be_whole: bool) -> None:
        try:
            self.nbytes += write(as_sections(copies))
        except DamagedCopyError as error:
            key = error.copy.block.key
            self._left_out.append(key)
            if must_be_whole:
                raise
            warnings.warn(f"lightning-scar leaves out what is damaged in memory, {error}", stacklevel=2)
            self._write(write, [copy for copy in copies if copy.block.key != key], must_be_whole)


def _read(source: Source, stored: StoredRefresh) -> Refresh | None:
    try:
        return read_refresh(source, stored)
    except DamagedError as error:
        warnings.warn(f"lightning-scar leaves out the refresh of {stored.group} in memory: {error}", stacklevel=2)
        return None
