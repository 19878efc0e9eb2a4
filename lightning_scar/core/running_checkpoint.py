"""The running checkpoint that a live training saves to.

A save takes three calls: ``save`` takes the checkpoint apart; ``stage`` starts to measure and copy, alongside the next
forward and backward if staging is lazy; ``fence`` lets nothing change before the copy is made, and hands the save to
the writer.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self

from lightning_scar.core.at_exit import write_back_at_exit
from lightning_scar.core.committer import Committer
from lightning_scar.core.devices import HostBuffer, HostBuffers
from lightning_scar.core.healing import heal, non_finite_blocks
from lightning_scar.core.live_state import Dissection
from lightning_scar.core.membership import ReplacementTicket, RunMembership
from lightning_scar.core.memory_use import tell_of_memory, warn_of_lost_memory, warn_of_memory, warn_of_unread_memory
from lightning_scar.core.neighbours import Neighbours
from lightning_scar.core.notices import Notices
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.read_back import ReadBack
from lightning_scar.core.recovery import RecoveryPlan
from lightning_scar.core.restoration import Restored, restore
from lightning_scar.core.save import Part, Save
from lightning_scar.core.settings import Settings
from lightning_scar.core.skeleton import Path
from lightning_scar.core.stager import Stager
from lightning_scar.core.stats import Stats
from lightning_scar.storage.delta import StorageError
from lightning_scar.storage.head import Version
from lightning_scar.storage.rank_store import RankStore
from lightning_scar.storage.writer import DEPTH, BackgroundWriter


class RunningCheckpoint:
    """A running checkpoint that a live training writes to.

    Args:
        url: Its directory, any fsspec URL.
        settings: What to save and how.
        storage_options: Passed to the file system.
        ranks: The processes that save together, each the blocks that it owns; by default this one alone. With several
            ranks, the constructor is a collective, with the same arguments on all.
        ticket: The :attr:`ticket` of another rank, for the replacement of a dead process. The constructor is then no
            collective, and the first save is full.

    Raises:
        StorageError: If the directory holds something else, or differs between ranks.
        DirectoryInUseError: If another live run holds it.
        OSError: If it cannot be written to and ``on_write_error="raise"``.

    Example::

        >>> import torch
        >>> from lightning_scar import load
        >>> weight = torch.zeros(4)
        >>> with RunningCheckpoint("memory://running-example", Settings(fraction=1.0)) as running:
        ...     for step in (1, 2):
        ...         weight += 1
        ...         running.save_now({"state_dict": {"weight": weight}}, step)
        >>> load("memory://running-example")["state_dict"]["weight"]
        tensor([2., 2., 2., 2.])

    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        settings: Settings | None = None,
        storage_options: dict[str, Any] | None = None,
        ranks: Ranks | None = None,
        ticket: ReplacementTicket | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.ranks = ranks or Ranks()
        self.store = RankStore(url, storage_options, self.ranks.rank, self.ranks.world_size)
        self.stats = Stats()
        self._notices = Notices()
        self.settings.warn_of_unused(self._notices, self.ranks.rank)
        self._membership = RunMembership(self.store, self.ranks, self.settings, ticket)
        self._take_note_of(self._membership.trouble)
        self._neighbours = Neighbours(self.store, self.ranks, self.settings, self._membership.token, ticket)
        self._sequence = ticket.sequence if ticket is not None else 0
        #: A summary of the last :meth:`restore`, and the number of ranks that had saved.
        self.recovery, self.restored_ranks = "", self.ranks.world_size
        self._has_base = False
        self._save: Save | None = None
        self._dissection = Dissection(self.ranks, self.settings.block_size)
        self._committer = Committer(self.store, self.stats, self.ranks, self._membership.incarnation)
        self._stager = Stager(self.settings, self._committer.negative)
        if ticket is not None:
            self._committer.go_on_from(ticket.lineage)
        self._buffers = HostBuffers(DEPTH)
        self._writer = BackgroundWriter()
        #: Whether what is saved can be loaded.
        self.read_back = ReadBack(str(self.store.directory), self.ranks.rank)
        self._late_errors: list[Exception] = []
        self._call_off_exit = write_back_at_exit(self.store, self._membership)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close it."""
        self.close()

    def _take_note_of(self, trouble: OSError | None) -> None:
        if trouble is None:
            return
        if self.settings.on_write_error == "raise":
            self._membership.release()
            raise trouble
        self._notices.warn(
            "write_error", f"{self.store.directory} cannot be written to: {trouble!r}. Training continues"
        )

    def restore(self, weights_only: bool | None = None, initial: dict[str, Any] | None = None) -> Restored:
        """Read what the directory holds, and let saves continue it. With several ranks a collective.

        Args:
            weights_only: As in ``torch.load``, for the skeleton.
            initial: A checkpoint dict of initial values, for blocks that have no version left.

        Raises:
            NoCheckpointError: If there is nothing to restore.
            IncompleteError: If a block has neither an intact version nor an initial value.

        """
        restored = restore(self.store, weights_only=weights_only, initial=initial, ranks=self.ranks, with_bases=True)
        warn_of_unread_memory(self._notices, self._membership.unread, self.ranks.rank)
        if self._membership.memory_is_lost:
            warn_of_lost_memory(self._notices, self.store)
            self._membership.forget_lost_memory()
        self._committer.go_on_from(self.store.index.lineage)
        for located, _ in restored.damages:
            self.store.index.discard(located)
        self.recovery = f"age of the oldest block {restored.oldest_age} steps. {restored.plan}"
        self.restored_ranks = restored.world_size
        bases, self._dissection.block_size = self._stager.bases, restored.map.block_size
        bases.adopt(restored.map, restored.bases, restored.plan.versions)
        self._committer.negative |= restored.negative
        self._has_base = not self._membership.unread
        self.settings.warn_of_block_size(self._notices, restored.map.block_size, str(self.store.directory))
        return restored

    def heal(
        self,
        checkpoint: dict[str, Any],
        *,
        optimizers: Mapping[Path, Optimizer] | None = None,
        parameters: Iterable[Tensor] = (),
    ) -> RecoveryPlan | None:
        """Restore the blocks of a live run that turned NaN or Inf, in place, with their optimizer state.

        Each comes from a rank that still has it, else from its newest intact version. With several ranks a collective,
        at the same step.

        Args:
            checkpoint: As in :meth:`save`.
            optimizers: As in :meth:`save`.
            parameters: As in :meth:`save`.

        Returns:
            The source of every block; ``None`` if all values are finite on all ranks.

        Raises:
            IncompleteError: If a block has no finite version.

        """
        self.fence()
        state = self._dissection.take_apart(checkpoint, optimizers, parameters)
        lost = self.ranks.gather(non_finite_blocks(state))
        if not any(lost):
            return None
        self.flush()
        # Other hosts see only what is in storage.
        self.ranks.together(self.store.bring_to_storage)
        self.ranks.gather(None)
        self.store.look_around(others=True)
        return heal(self.store, state, self.ranks, lost)

    @property
    def ticket(self) -> ReplacementTicket:
        """The ticket with which a replacement takes the place of a dead rank."""
        lineage = self.store.index.lineage[:-1]
        membership = self._membership
        return ReplacementTicket(
            membership.incarnation, lineage, self._sequence, membership.token, membership.run, self._neighbours.key
        )

    # -- a save --------------------------------------------------------------------------------------------------

    def save(
        self,
        checkpoint: dict[str, Any],
        step: int,
        *,
        optimizers: Mapping[Path, Optimizer] | None = None,
        parameters: Iterable[Tensor] = (),
        full: bool = False,
        wait: bool = False,
        info: Mapping[str, Any] | None = None,
    ) -> bool:
        """Begin a save: take the checkpoint apart and pickle the skeleton. :meth:`stage` must follow.

        Args:
            checkpoint: The checkpoint dict, with references to live tensors.
            step: The optimizer step that it belongs to.
            optimizers: The live optimizers by the places of their states in the checkpoint, e.g.
                ``{("optimizer_states", 0): optimizer}``; pairs optimizer state with parameters.
            parameters: Tensors that change only in optimizer steps, and may be staged lazily.
            full: Whether to save every block that has changed. The first save always does.
            wait: Whether to wait when the writer is behind, instead of skipping the save. A full save always waits.
            info: Small values to keep in the delta's header.

        Returns:
            Whether the save has begun; ``False`` if it was skipped, which is counted.

        Raises:
            StorageError: If another run has taken over the directory.
            OSError: If an earlier write failed and ``on_write_error="raise"``.

        """
        self.fence()
        self._settle_failures()
        if self._membership.is_lost:
            raise StorageError(f"another run has taken over {self.store.directory}; this one no longer saves")
        full = full or not self._has_base or self.store.is_hollow
        # Skipped saves count, too: blocks change owners, so a number must mean the same save on all ranks.
        self._sequence += 1
        if not self._writer.reserve(wait=wait or full):
            self.stats.skipped_saves += 1
            return False
        started = time.perf_counter()
        try:
            state = self._dissection.take_apart(checkpoint, optimizers, parameters)
            live = state.of(state.own)
            self._stager.bases.fit(state.own, live)
            skeleton, small = state.pack()
            state.warn_of_heavy(self._notices)
            parts = list(map(Part, state.own.groups, live))
            version = Version(self._membership.incarnation, self._sequence - 1, step)
            # A full save gets a temporary buffer: keeping one for the whole state would waste memory.
            buffer = HostBuffer() if full else self._buffers.next()
            self._save = Save(version, full, skeleton, parts, small, dict(info or {}), buffer)
        except BaseException:
            self._writer.give_back()
            raise
        self._save.stall += time.perf_counter() - started
        return True

    def stage(self) -> None:
        """Start to measure and copy the save; return at once if staging is lazy."""
        save = self._save
        if save is None or save.is_staged:
            return
        with self._standing_still(save):
            # Set first, so that the save is not staged twice after an interrupt.
            save.is_staged = True
            if not self._stager.start(save):
                self._hand_over(save)

    def fence(self) -> None:
        """Let nothing change before the save under way is copied, and hand it to the writer. Cheap without a save.

        If it is interrupted while it waits, e.g. by Ctrl-C, the next call finishes the save.
        """
        self.stage()
        save = self._save
        if save is None:
            return
        with self._standing_still(save):
            self._hand_over(save)

    def save_now(self, checkpoint: dict[str, Any], step: int, **options: Any) -> None:
        """Save, and return when the copy is made; arguments as in :meth:`save`. Never skipped."""
        self.save(checkpoint, step, wait=True, **options)
        self.fence()

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way, from its start until its delta is written."""
        return self._save is not None or self._writer.depth > 0

    def flush(self) -> None:
        """Wait until all saves are written."""
        self.fence()
        self._writer.drain()
        self.store.drain()

    def close(self) -> None:
        """Finish the saves under way, release the directory, and raise or warn about failed writes."""
        try:
            self.fence()
        finally:
            self._stager.close()
            self._writer.drain()
            self._give_back()
        self._settle_failures()

    def suspend(self) -> None:
        """Finish the saves under way, and leave everything else for the next start, as a process that dies does."""
        self._call_off_exit()
        self.flush()
        self._settle_failures()

    # -- its parts -----------------------------------------------------------------------------------------------

    def _give_back(self) -> None:
        self._call_off_exit()
        try:
            if not self._membership.is_lost:
                self.store.bring_to_storage()
        except Exception as error:
            # The lease tells the next start to look in memory.
            self._late_errors.append(error)
        is_stored = not self._late_errors and not self._membership.is_lost
        self._neighbours.close(is_stored)
        self.store.leave_memory(is_stored)
        self._membership.release(is_stored)
        self.stats.bytes_written = self.store.directory.stored_bytes

    def _hand_over(self, save: Save) -> None:
        self._stager.finish(save)
        self._has_base = True
        # Only now that it will be written: the other buffer may still be in the queue.
        self._buffers.keep(save.buffer)
        state_bytes = self._stager.bases.map.state_bytes
        # Before the writer, which adds to these counters, starts.
        self.stats.note(save)
        self._writer.submit(lambda: self._commit(save, state_bytes))
        # An interrupt before this line cancels the save, although it may be written; its blocks are then written again.
        self._save = None
        self.stats.warn_of_non_finite(self._notices)
        if self.stats.saves == 1 and self.store.write_back is not None:
            tell_of_memory(self._notices, self.store, self.settings, state_bytes)
        self.stats.queue_depth = self._writer.depth

    def _commit(self, save: Save, state_bytes: int) -> None:
        self._committer.commit(save, state_bytes)
        self.read_back.check(save.skeleton)

    def _settle_failures(self) -> None:
        """Raise or warn about failed writes, and let the next save write their blocks again."""
        self._take_unwritten()
        self.read_back.warn(self._notices)
        self.stats.warn_of_non_finite(self._notices)
        self.stats.bytes_written = self.store.directory.stored_bytes
        late = [*self.store.take_errors(), *self._late_errors]
        self._late_errors.clear()
        self.stats.failed_saves += len(late)
        warn_of_memory(self._notices, self.store, self.stats, self._neighbours.trouble)
        errors = [*self._writer.take_errors(), *late]
        if errors and self.settings.on_write_error == "raise":
            raise errors[0]
        if errors:
            self._notices.warn(
                "write_error",
                f"a save to {self.store.directory} failed, training continues without it: {errors[0]!r}. Further "
                "failures are counted as failed_saves",
            )

    def _take_unwritten(self) -> None:
        bases, lost = self._stager.bases, self.store.take_lost()
        while not self._committer.unwritten.empty():
            version, keys = self._committer.unwritten.get()
            # A block that was staged again meanwhile depends on the later save.
            lost |= keys & set(bases.written_by(version))
        bases.lose(lost, self._committer.is_stored)
        if lost:
            self._has_base = self._committer.is_stored(self._committer.skeleton_key)

    @contextmanager
    def _standing_still(self, save: Save) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except BaseException:
            # Cancel the save. But after an interrupt during staging, e.g. by Ctrl-C, the next call continues it.
            if self._save is save and not self._stager.is_at_work:
                self._save = None
                self._stager.call_off(save)
                self._writer.give_back()
            raise
        save.stall += time.perf_counter() - started
        if self._save is None:
            setattr(self.stats, "full_stall_seconds" if save.full else "stall_seconds", save.stall)
