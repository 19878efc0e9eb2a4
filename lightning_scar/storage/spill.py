"""What memory has newer than storage, on its way there."""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

from lightning_scar.storage.delta import BlockData, DamagedError, Delta, StoredBlock
from lightning_scar.storage.head import Head
from lightning_scar.storage.rank_store import RankStore, copied
from lightning_scar.storage.store import DeltaStore


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
        self._damaged: set[str] = set()
        self._left_out: deque[str] = deque()
        self.nbytes = 0

    def newer(self, store: DeltaStore, deltas: Sequence[Delta], files: ExitStack) -> Iterator[BlockData]:
        """The blocks that are newer there than in storage.

        Args:
            store: Where they are.
            deltas: In which files of it.
            files: Closes what is opened. Open, a file stays readable even if a later save replaces it.

        """
        for delta in deltas:
            blocks = [block for block in store.index.live(delta) if self._is_newer(block)]
            if blocks:
                source = files.enter_context(store.directory.source(delta.name))
                for block in blocks:
                    yield copied(delta, source, block, partial(self._damaged.add, block.key))

    def _is_newer(self, block: StoredBlock) -> bool:
        stored = self._storage.index.newest(block.key)
        return stored is None or stored.version < block.version

    def store(self, head: Head, blocks: Sequence[BlockData]) -> None:
        """Writes blocks as a delta of a save.

        Raises:
            DamagedError: If a block of a full save is damaged, of which all have to be there.
            OSError: If the file cannot be written.

        """
        self._write(partial(self._storage.commit, head), blocks, must_be_whole=head.kind == "full")

    def take_over(self, head: Head, blocks: Sequence[BlockData]) -> None:
        """Writes blocks of dead starts, which keep their versions.

        Raises:
            OSError: If the file cannot be written.

        """
        self._write(partial(self._storage.take_over, head), blocks, must_be_whole=False)

    def take_left_out(self) -> set[str]:
        """The keys of the blocks that were left out since the last call."""
        return {self._left_out.popleft() for _ in range(len(self._left_out))}

    def _write(
        self, write: Callable[[Sequence[BlockData]], int], blocks: Sequence[BlockData], must_be_whole: bool
    ) -> None:
        self._damaged.clear()
        try:
            self.nbytes += write(blocks)
        except DamagedError as error:
            intact = [block for block in blocks if block.key not in self._damaged]
            self._left_out.extend(self._damaged)
            if must_be_whole or len(intact) == len(blocks):
                raise
            warnings.warn(f"lightning-scar leaves out what is damaged in memory, {error}", stacklevel=2)
            self._write(write, intact, must_be_whole)
