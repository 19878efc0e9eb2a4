"""``SCARLoop``: priority checkpoints for a training written as a loop, in plain PyTorch or in Lightning Fabric."""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from typing_extensions import Self, Unpack

from lightning_scar.core.membership import ReplacementTicket
from lightning_scar.core.options import Options
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.signals import DeferredSignals, stop_signals
from lightning_scar.core.stats import Stats
from lightning_scar.loops.continuation import SCARContinuation
from lightning_scar.loops.framework import Framework
from lightning_scar.loops.optimizer_watch import OptimizerWatch
from lightning_scar.loops.options import LoopOptions
from lightning_scar.loops.position import LoopState
from lightning_scar.loops.training import LoopTraining


class SCARLoop:
    """Saves the blocks of a training loop that moved furthest, often, and resumes from them.

    The first save is full. Later ones write the blocks that moved furthest (SCAR, ICML 2019, section 4.2) and a
    low-precision copy of the rest. With a process group, every rank saves its share.

    Args:
        dirpath: The running checkpoint's directory, a path or any fsspec URL.
        state: What to save, by name, wrapped or not: modules, optimizers, schedulers, other objects with a state dict.
        continuation: Lets the workers survive the death of others; use :meth:`training_step` then.
        options: The fields of :class:`~lightning_scar.loops.options.LoopOptions`, such as ``every_n_steps=25``.

    Attributes:
        stats: Counters of this run, see :class:`~lightning_scar.core.stats.Stats`.

    Raises:
        ValueError: If a value is out of range, or there is more than one interval.
        TypeError: If something in ``state`` has no state.

    Example::

        >>> import torch
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> loader = torch.utils.data.DataLoader(torch.randn(6, 4), shuffle=True)
        >>> state = {"model": model, "optimizer": optimizer}
        >>> with SCARLoop("memory://loop-example", state, every_n_steps=2) as scar:
        ...     _ = scar.resume()
        ...     for batch in scar.batches(loader):
        ...         optimizer.zero_grad()
        ...         model(batch).square().mean().backward()
        ...         optimizer.step()
        ...         scar.step()
        >>> with SCARLoop("memory://loop-example", state, every_n_steps=2) as scar:
        ...     scar.resume()  # the run is finished
        6

    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        state: Mapping[str, Any] | Framework,
        *,
        continuation: SCARContinuation | None = None,
        **options: Unpack[LoopOptions],
    ) -> None:
        self._options = Options(**options)
        self._settings = self._options.settings()
        self._schedule = self._options.schedule()
        self._healer = self._options.healer()
        self.dirpath = os.fspath(dirpath)
        self.stats = Stats()
        framework = state if isinstance(state, Framework) else Framework(state)
        self.state = LoopState(framework, self.dirpath, self._options.strict)
        self._continuation = continuation
        self._training: LoopTraining | None = None
        self._running: RunningCheckpoint | None = None
        self._watch: OptimizerWatch | None = None
        self._signals: DeferredSignals | None = None
        self._is_finished = False
        if continuation is not None:
            continuation.prepare(framework)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: a loop with the same options that was not resumed."""
        fresh = SCARLoop(self.dirpath, self.state.framework, **vars(self._options))
        return {**vars(self), **vars(fresh), "_continuation": self._continuation}

    @property
    def epoch(self) -> int:
        """The number of epochs of :meth:`batches` that are done, including those before the run was resumed."""
        return self.state.data.epoch

    @property
    def batches_done(self) -> int:
        """The number of calls of :meth:`step`, including those before the run was resumed."""
        return self.state.batches

    @property
    def steps(self) -> int:
        """The number of these calls in which an optimizer had stepped."""
        return self.state.steps

    @property
    def finished(self) -> bool:
        """Whether the run is finished: :meth:`resume` found it so, and no batch has followed, or it was closed.

        A loop that a criterion of its own has ended early asks this after :meth:`resume`, and stays finished.
        """
        return self._is_finished

    def __enter__(self) -> Self:
        """Return the loop itself, which is closed at the end of the block."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Close the loop. After an exception, the run is not marked as finished."""
        if error is None:
            self.close()
        else:
            self._abandon(error)

    # -- start and end -------------------------------------------------------------------------------------------

    def resume(self, weights_only: bool | None = None) -> int:
        """Open the directory, and resume from what it contains. Call it once, right before the loop.

        With several ranks, this is a collective. It restores modules, optimizers, schedulers, other objects and the
        random generators of this process; :meth:`batches` then continues where the data were.

        Args:
            weights_only: As in ``torch.load``, for everything but large tensors, which are never unpickled.

        Returns:
            The number of batches that are done: calls of :meth:`step`, up to the last optimizer step. 0 if the
            directory is new. On another number of ranks, in proportion to it.

        Raises:
            StorageError: If the directory holds something else, a newer format, or is not the same on all ranks.
            ValueError: If there is no model or no optimizer, or a continuation does not support them.
            DirectoryInUseError: If another live run uses it.
            ModelMismatchError: If another model or a Trainer wrote the checkpoint, or the ranks' models differ.
            RuntimeError: If it was called before.

        """
        if self._running is not None or self._watch is not None:
            raise RuntimeError("resume() was called before; create a new object for another loop")
        try:
            self._start(weights_only)
        except BaseException as error:
            if self._training is not None:
                self._training.fail(error)
            self.leave()
            raise
        self._watch = OptimizerWatch(self.state.parts.inner_optimizers, before_step=self.fence)
        if self._training is None:
            self._signals = DeferredSignals(stop_signals())
        return self.batches_done

    def _start(self, weights_only: bool | None) -> None:
        self.state.collect_parts()
        training, restart_state = None, None
        if self._continuation is not None and self._continuation.member is not None:
            training = self._training = LoopTraining(self, self._continuation, self._continuation.member)
            restart_state = training.restart_state()
        if training is not None and training.engine.is_joiner:
            # This process must not run a collective before it joins.
            self.state.data.ranks = training.ranks
        else:
            self.state.data.ranks = Ranks.of_default_group()
            self.state.record_position()
            running = self._open()
            first: int | None = 0
            if not self._options.resume:
                # The saves of this same job still count after a restart of all workers.
                first = training.first_incarnation(running.ticket.incarnation) if training is not None else None
            self._is_finished = self.state.resume(running, restart_state, first, weights_only)
            self._schedule.begin(self.steps, running)
        if training is not None:
            training.start(restart_state)

    def _open(self, ticket: ReplacementTicket | None = None) -> RunningCheckpoint:
        running = RunningCheckpoint(
            self.dirpath, self._settings, self._options.storage_options, self.state.ranks, ticket
        )
        self._running, self.stats = running, running.stats
        return running

    def close(self) -> None:
        """Save everything, wait until it is written, and mark the run as finished, unless it was already.

        With a continuation, it waits for the complete group, because what follows the loop may require all workers.

        Raises:
            OSError: If a write failed and ``on_write_error="raise"``.

        """
        if self._running is None:
            return
        try:
            if self._training is not None:
                self._training.finish()
            if not self._is_finished:
                self.state.record_position()
                self._save(full=True, finished=True)
                self._is_finished = True
        except BaseException as error:
            self._abandon(error)
            raise
        self.leave()
        if self._training is not None:
            self._training.end()

    def _abandon(self, error: BaseException) -> None:
        """Save after an exception. Errors of this save are warnings, so that the user sees the first exception."""
        if self._running is None:
            return
        if self._training is not None:
            self._training.fail(error)
        try:
            # After a step that is not counted yet, a save would make the next run repeat it.
            is_between_steps = self._watch is not None and not self._watch.has_stepped
            if self._options.save_on_exception and is_between_steps and self.steps != self._schedule.last_full_step:
                self._save(full=True)
        except Exception as second:
            warnings.warn(f"lightning-scar: the last save failed, too: {second!r}", stacklevel=3)
        try:
            self.leave()
        except Exception as second:
            warnings.warn(f"lightning-scar: an earlier save failed, too: {second!r}", stacklevel=3)

    def leave(self) -> None:
        """Wait until everything is written, and release the directory. A deferred signal takes effect."""
        running, self._running = self._running, None
        self._schedule.end()
        self.state.data.close()
        if self._watch is not None:
            self._watch.remove()
        try:
            if running is not None:
                running.close()
        finally:
            signals, self._signals = self._signals, None
            if signals is None and self._training is not None:
                signals = self._training.signals
            if signals is not None:
                signals.proceed()

    def save_and_leave(self) -> None:
        """Save everything of an unfinished run, and release the directory."""
        self._save(full=True)
        self.leave()

    # -- its data ------------------------------------------------------------------------------------------------

    def batches(self, loader: Any) -> Iterator[Any]:
        """Yield the batches of one epoch, or after a resume those that are not done.

        They are those that an undisturbed run would serve, if the dataset has indices or the loader a ``state_dict``;
        other data must come in the same order again. Another number of ranks shares out the rest of the epoch::

            for epoch in range(scar.epoch, epochs):
                for batch in scar.batches(loader):
                    ...

        Args:
            loader: The training data. Call :meth:`resume` before.

        """
        self._check_open()
        return self.state.data.batches(loader)

    # -- a batch -------------------------------------------------------------------------------------------------

    def training_step(
        self, closure: Callable[..., Any], batch: Any = None, update: Callable[[], Any] | None = None
    ) -> Any:
        """Compute the gradient of a batch and make the optimizer step, even if another worker dies meanwhile.

        In that case the closure is called again, after gradients, buffers and torch's random generators are restored.
        Call :meth:`step` next. In :class:`SCARLoop` this is one optimizer step; with gradient accumulation, the closure
        computes all of its batches. :class:`~lightning_scar.SCARAccelerator` handles accumulation.

        Args:
            closure: Runs forward and backward, and returns the loss. It may be called twice, so it must have no other
                effects, and it must not step optimizers or clip gradients.
            batch: The argument of the closure; if omitted, the closure is called without one.
            update: Clips gradients, steps optimizers and schedulers, and zeroes the gradients. It must not run a
                collective. By default, it steps all optimizers and schedulers, and zeroes all gradients.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: If :meth:`resume` was not called before, or :meth:`step` not after the previous batch; or if
                fewer than ``min_world_size`` workers are left.

        """
        self._check_open()
        if self._training is not None:
            return self._training.step(closure, batch, update or self.state.framework.update)
        loss = closure() if batch is None else closure(batch)
        (update or self.state.framework.update)()
        return loss

    def step(self) -> None:
        """Count a batch, and start a save if one is due. Call it last in the loop's body, for every batch.

        A batch without an optimizer step, as in gradient accumulation, is counted, but no save follows it.

        Raises:
            RuntimeError: If :meth:`resume` was not called before, or :meth:`close` was.
            OSError: If an earlier write failed and ``on_write_error="raise"``.

        """
        running = self._check_open()
        if self._is_finished:
            self._is_finished = False
            if self.state.ranks.rank == 0:
                print(f"lightning-scar: the finished run in {self.dirpath} trains on", file=sys.stderr, flush=True)
        self.state.count_batch()
        has_stepped = self._watch is not None and self._watch.pop()
        self.state.steps += has_stepped
        if self._training is not None:
            self._training.count()
        if not has_stepped:
            return
        self.state.record_position()
        if self._signals is not None and self._signals.received is not None:
            if self._signals.received != signal.SIGINT or self._options.save_on_exception:
                self._save(full=True)
                running.flush()
            # A custom handler may let the program continue.
            self._signals.proceed()
        elif (due := self._schedule.due(self.steps)) is not None:
            if due.common and self._healer.is_due(running):
                self.heal()
            self._save(full=due.full)

    def heal(self) -> bool:
        """Restore the blocks of the live run that became NaN or Inf, with their optimizer state, and warn about it.

        With several ranks, this is a collective, which all must call after the same :meth:`step`.

        Returns:
            Whether anything was restored, on any rank.

        Raises:
            IncompleteError: If there is no finite version of a block.
            RuntimeError: If this happened more than ``max_heals`` times, or :meth:`resume` was not called before.

        """
        return self._healer.heal(self._check_open(), self.state.dump(), self.steps, **self.state.parts.live_parts)

    def _check_open(self) -> RunningCheckpoint:
        if self._running is None:
            raise RuntimeError(
                "call resume() once, before the first step, and nothing after close(). To start again and overwrite "
                f"the directory, pass resume=False to {type(self).__name__}."
            )
        return self._running

    def fence(self) -> None:
        """Wait until the current save is copied.

        Call it before something other than an optimizer changes weights in a way that autograd does not see: through
        ``.data``, by a collective, or by a fused kernel.
        """
        if self._running is not None:
            self._running.fence()

    def _save(self, full: bool, finished: bool = False) -> None:
        assert self._running is not None
        self._schedule.note(self.steps, full)
        info = {"finished": finished, "global_step": self.steps, "batches": self.batches_done}
        self._running.save(self.state.dump(), self.steps, **self.state.parts.live_parts, full=full, info=info)
        self._running.stage()

    # -- for its continuation ------------------------------------------------------------------------------------

    def load_step(self, checkpoint: dict[str, Any]) -> None:
        """Load the step of the current batch from another rank. The batch itself is not counted yet."""
        self.fence()
        self.state.load_step(checkpoint)
        if self._watch is not None:
            self._watch.has_stepped = True

    def hand_over(self) -> Any:
        """Return what a replacement needs to continue the saves of a dead worker."""
        return (self._running.ticket, self._schedule.hand_over()) if self._running is not None else None

    def take_over(self, ticket: Any) -> None:
        """Continue the saves of a dead worker; ``ticket`` is another rank's :meth:`hand_over`."""
        self._schedule.begin(self.steps, self._open(ticket[0]), ticket[1])
