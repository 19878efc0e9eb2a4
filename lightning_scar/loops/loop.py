"""``SCARLoop``: priority checkpoints for a training written as a loop, in plain PyTorch or in Lightning Fabric."""

import os
import threading
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Literal

from torch import Tensor
from typing_extensions import Self

from lightning_scar.core.claim import Seat
from lightning_scar.core.healer import Healer
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.schedule import Schedule
from lightning_scar.core.selection import Candidates
from lightning_scar.core.settings import PolicyName, Settings
from lightning_scar.core.sigterm import DeferredSigterm
from lightning_scar.core.stats import Stats
from lightning_scar.loops.continuation import SCARContinuation
from lightning_scar.loops.framework import Framework
from lightning_scar.loops.optimizer_watch import OptimizerWatch
from lightning_scar.loops.position import LoopState
from lightning_scar.loops.training import LoopTraining


class SCARLoop:
    """Saves the blocks of a training loop that moved furthest, often, and resumes from them.

    The first save is full; later ones write what moved furthest (SCAR, ICML 2019, section 4.2) and a low-precision copy
    of the rest. With a process group every rank saves its share.

    Args:
        dirpath: The running checkpoint's directory, a path or any fsspec URL.
        state: What to save, by name, wrapped or not: modules, optimizers, schedulers, and whatever has a state dict.
        every_n_steps: Save every N optimizer steps; or
        train_time_interval: save when that much time has passed, at the next optimizer step; or
        max_overhead: as often as this share of the training time allows, in (0, 1). Without any of the three 0.01.
        fraction: The share of the state's bytes that one save may write, in (0, 1].
        refresh: ``"auto"`` spends a part of that on a low-precision copy of all the rest; ``None`` is SCAR's own form.
        policy: ``"distance"``, ``"round_robin"``, ``"random"``, or a function from
            :class:`~lightning_scar.core.selection.Candidates` to one priority a block.
        block_size: Bytes of a parameter's rows in a block; ``None`` aims at 4096 blocks of 4 KiB to 4 MiB.
        max_age: Steps after which a block is due whatever its priority; ``None`` for never.
        full_every_n_saves: Every Nth save is full, for ``load(dirpath, consistent=True)``; else the first and the last.
        staging: ``"lazy"`` scores and copies beside the next forward and backward, ``"eager"`` at once.
        resume: Whether to go on from what ``dirpath`` holds. ``False`` begins anew, over it.
        strict: Whether a running checkpoint of another model is an error; ``False`` loads what fits.
        save_on_exception: Whether to save when the ``with`` block ends with an exception.
        on_write_error: ``"warn"`` goes on training when a save cannot be written, ``"raise"`` stops it.
        heal_non_finite: Whether to look for NaN and Inf before every save, and to :meth:`heal` what holds any.
        max_heals: How often that may happen; after that it is an error.
        memory: Whether saves go to this host's memory first (``/dev/shm``, or ``LIGHTNING_SCAR_MEMORY``).
        durable_every_n_saves: With it, every Nth save goes to ``dirpath``, too; full ones always do.
        replicas: With it, on how many other hosts each rank keeps a copy, for the loss of its host.
        memory_limit: Bytes of memory that each rank may take, and each of its copies; ``None`` for what there is.
        storage_options: Passed to the file system of ``dirpath``.
        continuation: Lets the workers of this loop outlive each other; :meth:`training_step` makes the steps then.

    Attributes:
        stats: Counters of this run, see :class:`~lightning_scar.core.stats.Stats`.

    Raises:
        ValueError: If a value is out of range, or there is more than one interval.
        TypeError: If something in ``state`` has no state.

    Example::

        >>> import torch
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> data = [torch.randn(2, 4) for _ in range(6)]
        >>> state = {"model": model, "optimizer": optimizer}
        >>> with SCARLoop("memory://loop-example", state, every_n_steps=2) as scar:
        ...     for batch in data[scar.resume() :]:
        ...         optimizer.zero_grad()
        ...         model(batch).square().mean().backward()
        ...         optimizer.step()
        ...         scar.step()
        >>> with SCARLoop("memory://loop-example", state, every_n_steps=2) as scar:
        ...     scar.resume()  # all of it is done
        6

    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        state: Mapping[str, Any] | Framework,
        *,
        every_n_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        max_overhead: float | None = None,
        fraction: float = 0.125,
        refresh: Literal["auto"] | None = "auto",
        policy: PolicyName | Callable[[Candidates], Tensor] = "distance",
        block_size: int | None = None,
        max_age: int | None = None,
        full_every_n_saves: int | None = None,
        staging: Literal["lazy", "eager"] = "lazy",
        resume: bool = True,
        strict: bool = True,
        save_on_exception: bool = True,
        on_write_error: Literal["warn", "raise"] = "warn",
        heal_non_finite: bool = False,
        max_heals: int = 3,
        memory: bool = False,
        durable_every_n_saves: int = 8,
        replicas: int = 1,
        memory_limit: int | None = None,
        storage_options: dict[str, Any] | None = None,
        continuation: SCARContinuation | None = None,
    ) -> None:
        in_memory = memory, durable_every_n_saves, replicas, memory_limit, refresh
        self._settings = Settings(fraction, policy, block_size, max_age, staging, on_write_error, *in_memory)
        self._schedule = Schedule(every_n_steps, train_time_interval, max_overhead, full_every_n_saves)
        self._healer = Healer(heal_non_finite, max_heals)
        self.dirpath = os.fspath(dirpath)
        self.stats = Stats()
        framework = state if isinstance(state, Framework) else Framework(state)
        self.state = LoopState(framework, self.dirpath, strict)
        self._resume = resume
        self._save_on_exception = save_on_exception
        self._storage_options = storage_options
        self._continuation = continuation
        self._training: LoopTraining | None = None
        self._running: RunningCheckpoint | None = None
        self._watch: OptimizerWatch | None = None
        self._sigterm: DeferredSigterm | None = None
        if continuation is not None:
            continuation.prepare(framework)

    @property
    def batches(self) -> int:
        """How often :meth:`step` was called, those calls included that were resumed from."""
        return self.state.batches

    @property
    def steps(self) -> int:
        """In how many of them an optimizer made a step."""
        return self.state.steps

    def __enter__(self) -> Self:
        """The end of the block closes it."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Closes it; behind an exception a run is not finished."""
        if error is None:
            self.close()
        else:
            self._abandon(error)

    # -- beginning and end ---------------------------------------------------------------------------------------

    def resume(self, weights_only: bool | None = None) -> int:
        """Takes the directory, and goes on from what it holds. To be called once, right before the loop.

        With several ranks a collective. Modules, optimizers, schedulers, other objects and the random generators of
        this process get what was saved; the loop's data are for the caller to skip.

        Args:
            weights_only: As in ``torch.load``, for everything but large tensors, which are never unpickled.

        Returns:
            How many batches are done: calls of :meth:`step`, up to the last optimizer step. 0 if the directory is new.
            On another number of ranks it is what these would have done: with Accelerate epoch by epoch, and rather too
            few than too many; else in proportion, which is right where epochs have the same samples on any number.

        Raises:
            StorageError: If the directory holds something else, a newer format, or is not the same on all ranks.
            ValueError: If there is no model or no optimizer, or a continuation cannot have them.
            DirectoryInUseError: If another live run uses it.
            ModelMismatchError: If another model wrote it, or a Lightning Trainer, or the ranks' models differ.
            RuntimeError: If it was called before.

        """
        if self._running is not None or self._watch is not None:
            raise RuntimeError("resume() was called before; make a new object for another loop")
        try:
            self._begin(weights_only)
        except BaseException as error:
            if self._training is not None:
                self._training.fail(error)
            self.leave()
            raise
        self._watch = OptimizerWatch(self.state.parts.inner_optimizers, before_step=self.fence)
        if self._training is None and threading.current_thread() is threading.main_thread():
            self._sigterm = DeferredSigterm()
        return self.batches

    def _begin(self, weights_only: bool | None) -> None:
        self.state.begin()
        training, kept = None, None
        if self._continuation is not None and self._continuation.member is not None:
            training = self._training = LoopTraining(self, self._continuation, self._continuation.member)
            kept = training.kept()
        if training is not None and training.engine.is_joiner:
            # The first collective of this process is the one in which it is taken in.
            self.state.ranks = training.ranks
        else:
            self.state.ranks = Ranks.of_default_group()
            self.state.note()
            running = self._open()
            self.state.go_on(running, kept, self._first_incarnation(running), weights_only)
            self._schedule.begin(self.steps, running)
        if training is not None:
            training.begin(kept)

    def _open(self, seat: Seat | None = None) -> RunningCheckpoint:
        running = RunningCheckpoint(self.dirpath, self._settings, self._storage_options, self.state.ranks, seat)
        self._running, self.stats = running, running.stats
        return running

    def _first_incarnation(self, running: RunningCheckpoint) -> int | None:
        """The first start whose saves count; ``None`` if none on disk does."""
        if self._resume:
            return 0
        # All workers may have been started again: what this very job has saved is not to be replaced.
        return self._training.first_incarnation(running.seat.incarnation) if self._training is not None else None

    def close(self) -> None:
        """Saves everything, waits until it is written, and marks the run as finished.

        With a continuation it waits until nobody is missing: what follows the loop may need all workers.

        Raises:
            OSError: If a write failed and ``on_write_error="raise"``.

        """
        if self._running is None:
            return
        try:
            if self._training is not None:
                self._training.finish()
            self._save(full=True, finished=True)
        except BaseException as error:
            self._abandon(error)
            raise
        self.leave()
        if self._training is not None:
            self._training.engine.end()

    def _abandon(self, error: BaseException) -> None:
        """Saves what there is while an exception is under way, which is the one that the user must see."""
        if self._running is None:
            return
        if self._training is not None:
            self._training.fail(error)
        try:
            # A step that is not counted yet would be made twice.
            is_between_steps = self._watch is not None and not self._watch.has_stepped
            if self._save_on_exception and is_between_steps and self.steps != self._schedule.last_full_step:
                self._save(full=True)
        except Exception as second:
            warnings.warn(f"lightning-scar: the last save failed too: {second!r}", stacklevel=3)
        try:
            self.leave()
        except Exception as second:
            warnings.warn(f"lightning-scar: an earlier save failed too: {second!r}", stacklevel=3)

    def leave(self) -> None:
        """Waits until everything is written, and gives the directory back. A SIGTERM that was put off does its work."""
        running, self._running = self._running, None
        self._schedule.end()
        if self._watch is not None:
            self._watch.end()
        try:
            if running is not None:
                running.close()
        finally:
            sigterm, self._sigterm = self._sigterm, None
            if sigterm is not None:
                sigterm.proceed()

    def save_and_leave(self) -> None:
        """Saves everything of a run that is not finished, and gives the directory back."""
        self._save(full=True)
        self.leave()

    # -- a batch -------------------------------------------------------------------------------------------------

    def training_step(
        self, closure: Callable[..., Any], batch: Any = None, update: Callable[[], Any] | None = None
    ) -> Any:
        """Computes the gradient of a batch and makes the optimizer step, whoever dies meanwhile.

        When another worker dies in it, the closure is called again, with gradients, buffers and torch's random
        generators as they were. :meth:`step` must follow. In :class:`SCARLoop` it is one optimizer step: where several
        batches make one, the closure computes all of them. :class:`~lightning_scar.SCARAccelerator` knows accumulation.

        Args:
            closure: Runs forward and backward, and returns the loss. It must change nothing else that a second call
                would change again, and it does not step optimizers or clip gradients.
            batch: Given to the closure; left out, the closure is called without.
            update: Clips, steps optimizers and schedulers, and sets gradients to zero; it runs no collective. By
                default it steps all optimizers and schedulers that there are, and sets all gradients to zero.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: If :meth:`resume` was not called before, or :meth:`step` not behind the batch before; or with
                fewer workers than ``min_world_size``.

        """
        self._check_open()
        if self._training is not None:
            return self._training.step(closure, batch, update or self.state.framework.update)
        loss = closure() if batch is None else closure(batch)
        (update or self.state.framework.update)()
        return loss

    def step(self) -> None:
        """Counts a batch, and begins a save if one is due. To be called last in the loop's body, for every batch.

        Batches without an optimizer step, as in gradient accumulation, are counted but never saved behind.

        Raises:
            RuntimeError: If :meth:`resume` was not called before, or :meth:`close` was.
            OSError: If an earlier write failed and ``on_write_error="raise"``.

        """
        running = self._check_open()
        self.state.framework.look_at_batch()
        self.state.batches += 1
        has_stepped = self._watch is not None and self._watch.take()
        self.state.steps += has_stepped
        if self._training is not None:
            self._training.count()
        if not has_stepped:
            return
        self.state.note()
        if self._sigterm is not None and self._sigterm.received:
            self._save(full=True)
            running.flush()
            # Whoever has a handler of his own may go on.
            self._sigterm.proceed()
        elif (due := self._schedule.due(self.steps)) is not None:
            if due.common and self._healer.is_due(running):
                self.heal()
            self._save(full=due.full)

    def heal(self) -> bool:
        """Restores the blocks of the live run that turned NaN or Inf, with their optimizer rows, and warns of it.

        With several ranks a collective, to be called by all behind the same :meth:`step`.

        Returns:
            Whether anything had to be restored, on any rank.

        Raises:
            IncompleteError: If there is no finite version of a block.
            RuntimeError: If it happened more than ``max_heals`` times, or :meth:`resume` was not called before.

        """
        return self._healer.heal(self._check_open(), self.state.dump(), self.steps, **self.state.parts.live_parts)

    def _check_open(self) -> RunningCheckpoint:
        if self._running is None:
            raise RuntimeError(
                "call resume() once, before the first step, and nothing behind close(). To begin anew over what there "
                f"is, give resume=False to {type(self).__name__}."
            )
        return self._running

    def fence(self) -> None:
        """Waits until the save under way is copied.

        To be called before weights are changed by something else than an optimizer, in a way that autograd does not
        see: through ``.data``, by a collective, or by a fused kernel.
        """
        if self._running is not None:
            self._running.fence()

    def _save(self, full: bool, finished: bool = False) -> None:
        assert self._running is not None
        self._schedule.note(self.steps, full)
        info = {"finished": finished, "global_step": self.steps, "batches": self.batches}
        self._running.save(self.state.dump(), self.steps, **self.state.parts.live_parts, full=full, info=info)
        self._running.stage()

    # -- for its continuation ------------------------------------------------------------------------------------

    def take_step(self, checkpoint: dict[str, Any]) -> None:
        """Takes the step of the present batch from another rank; the batch itself is still to be counted."""
        self.fence()
        self.state.take_step(checkpoint)
        if self._watch is not None:
            self._watch.has_stepped = True

    def hand_over(self) -> Any:
        """What a process needs to save in the place of a worker that died."""
        return (self._running.seat, self._schedule.hand_over()) if self._running is not None else None

    def take_over(self, seat: Any) -> None:
        """Saves in the place of a worker that died; ``seat`` is another rank's :meth:`hand_over`."""
        self._schedule.begin(self.steps, self._open(seat[0]), seat[1])
