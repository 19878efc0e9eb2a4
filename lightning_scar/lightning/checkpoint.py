"""``SCARCheckpoint``: a running checkpoint of what a Trainer trains."""

import os
import signal
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_scar.core.live_state import live_parts
from lightning_scar.core.membership import ReplacementTicket
from lightning_scar.core.options import Options
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.selection import Candidates
from lightning_scar.core.settings import PolicyName
from lightning_scar.core.stats import Stats
from lightning_scar.lightning import loggers, moment, private, replacement
from lightning_scar.lightning.checkpoint_io import SCARCheckpointIO, installed_io
from lightning_scar.lightning.data import TrainingData
from lightning_scar.lightning.fences import Fences
from lightning_scar.lightning.fit_start import FitStart
from lightning_scar.lightning.preemption import Preemption
from lightning_scar.lightning.refusals import as_misconfiguration, check_strategy
from lightning_scar.lightning.restart import trainer_calls
from lightning_scar.lightning.step_count import StepCount
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.places import open_store


class SCARCheckpoint(Checkpoint):
    """Saves the blocks that moved furthest, often, and resumes from them automatically.

    The first save is full. Later ones write the fraction of the state that moved furthest since it was saved (SCAR,
    ICML 2019, section 4.2). If ``dirpath`` holds the running checkpoint of an interrupted run when ``fit`` starts,
    training resumes from it. At the end of ``fit``, one full save marks the run as finished: started again, it is
    loaded, and trains on only if the limits are higher.

    Args:
        dirpath: The running checkpoint's directory, a path or any fsspec URL.
        every_n_train_steps: Save every N optimizer steps. Set at most one of the three intervals.
        train_time_interval: Save when this time has passed, at the next optimizer step.
        max_overhead: Save as often as this share of the training time allows, in (0, 1), and at least every 10 minutes.
            Without any interval it is 0.01.
        fraction: The share of the state's bytes that one save may write, in (0, 1], refresh included.
        refresh: ``"auto"`` spends a part of that on a low-precision copy of all that a save does not write exactly;
            ``None`` is SCAR's own form.
        policy: ``"distance"``, ``"round_robin"``, ``"random"``, or a function from
            :class:`~lightning_scar.core.selection.Candidates` to one priority per block.
        block_size: Bytes of a parameter's rows in a block; ``None`` aims at 4096 blocks of 4 KiB to 4 MiB.
        max_age: Steps after which a block is written, whatever its priority; ``None`` for no limit.
        full_every_n_saves: Make every Nth save full, for ``load(dirpath, consistent=True)``; ``None`` for the first and
            the last only.
        staging: ``"lazy"`` scores and copies during the next forward and backward, ``"eager"`` at once.
        resume: Whether to resume from what ``dirpath`` holds; ``False`` starts again and overwrites it.
        strict: Whether a running checkpoint of another model is an error; ``False`` loads what fits.
        save_on_exception: Whether to save when training ends with an exception or Ctrl-C.
        on_write_error: ``"warn"`` continues the training when a save cannot be written, ``"raise"`` stops it.
        heal_non_finite: Whether to check for NaN and Inf before every save, and to restore the blocks that contain any,
            on all ranks; see :meth:`heal`.
        max_heals: How often that may happen in one run; after that it is an error.
        memory: Whether to save to this host's memory first, which outlives the processes (``/dev/shm``, or what the
            environment variable ``LIGHTNING_SCAR_MEMORY`` names).
        durable_every_n_saves: With ``memory``, every Nth save also goes to ``dirpath``; full ones always do.
        replicas: With ``memory``, the number of other hosts on which each rank keeps a copy, in case its host is lost.
        memory_limit: With ``memory``, the bytes that each rank may use, and each of its copies; ``None`` for all that
            is free.
        storage_options: Arguments of the file system of ``dirpath``.

    Raises:
        MisconfigurationException: If a value is out of range, if there is more than one interval, or for a sharded
            strategy.
        StorageError: When ``fit`` starts, if ``dirpath`` holds something else, a newer format, or is not the same
            directory on all ranks.
        DirectoryInUseError: When ``fit`` starts, if another live run uses ``dirpath``.
        ModelMismatchError: When ``fit`` starts, if another model wrote the running checkpoint.

    Example::

        >>> from lightning_scar import SCARCheckpoint
        >>> from lightning.pytorch import Trainer
        >>> scar = SCARCheckpoint("runs/a/scar")
        >>> trainer = Trainer(callbacks=[scar], logger=False, enable_progress_bar=False, accelerator="cpu")
        >>> # trainer.fit(model, datamodule)      # the second time it resumes by itself

    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        *,
        every_n_train_steps: int | None = None,
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
    ) -> None:
        options = self._options = Options(
            every_n_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            max_overhead=max_overhead,
            fraction=fraction,
            refresh=refresh,
            policy=policy,
            block_size=block_size,
            max_age=max_age,
            full_every_n_saves=full_every_n_saves,
            staging=staging,
            resume=resume,
            strict=strict,
            save_on_exception=save_on_exception,
            on_write_error=on_write_error,
            heal_non_finite=heal_non_finite,
            max_heals=max_heals,
            memory=memory,
            durable_every_n_saves=durable_every_n_saves,
            replicas=replicas,
            memory_limit=memory_limit,
            storage_options=storage_options,
        )
        with as_misconfiguration():
            self._settings = options.settings()
            self._schedule = options.schedule("every_n_train_steps", tell=rank_zero_info)
            self._healer = options.healer()
        self.dirpath = os.fspath(dirpath)
        self.stats = Stats()
        self._running: RunningCheckpoint | None = None
        self._start: FitStart | None = None
        self._io: SCARCheckpointIO | None = None
        self._preemption = Preemption()
        self._steps = StepCount()
        self._is_batch_over = False
        self._logged_saves = 0
        self._finished_here = False

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: a callback with the same options that does not run."""
        options = dict(vars(self._options))
        fresh = SCARCheckpoint(self.dirpath, every_n_train_steps=options.pop("every_n_steps"), **options)
        return {**vars(self), **vars(fresh)}

    @property
    def best_model_path(self) -> str:
        """The path that ``ckpt_path="best"`` loads if this is the Trainer's only checkpoint callback."""
        return "" if open_store(self.dirpath, self._options.storage_options).is_empty() else self.dirpath

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        """Do nothing. Launchers set the path from their processes, but here the directory itself tells."""

    @property
    def resumes(self) -> bool:
        """Whether a ``fit`` without ``ckpt_path`` resumes: not from a run that this process itself has finished."""
        return self._options.resume and not self._finished_here

    @property
    def has_begun(self) -> bool:
        """Whether a run has begun in the directory, even if it has not saved anything."""
        return Directory(self.dirpath, self._options.storage_options).exists()

    # -- start and end of a fit ----------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Open the directory and decide what to resume from."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        check_strategy(trainer)
        self._preemption = Preemption.of(trainer)
        self._io = installed_io(trainer, self._options.storage_options)
        if stage != "fit":
            return
        TrainingData.of(trainer)
        if replacement.is_joiner(trainer):
            return
        running = self._open(trainer)
        start = self._start = FitStart(trainer, running, self.resumes, self._options)
        restart_state = trainer_calls.restart_state()
        if restart_state is None or restart_state.step < start.newest_step:
            start.intercept()

    def hand_over(self) -> Any:
        """Return what this callback needs in a replacement."""
        return (self._running.ticket, self._schedule.hand_over()) if self._running is not None else None

    def take_over(self, trainer: pl.Trainer, ticket: Any) -> None:
        """Continue the saves of a dead rank; ``ticket`` is another rank's :meth:`hand_over`."""
        if ticket is not None:
            self._open(trainer, *ticket)

    def fence(self) -> None:
        """Wait until the current save is copied. Call it before anything but an optimizer changes weights."""
        if self._running is not None:
            self._running.fence()

    def suspend(self, trainer: pl.Trainer, saves: bool) -> None:
        """Finish the saves, before a restart of all workers; with ``saves`` also one of all blocks of this rank."""
        if self._running is not None:
            if saves:
                self._save(trainer, full=True)
            self._running.suspend()

    def optimizer_states(self, trainer: pl.Trainer) -> list[Any]:
        """Return the states of all optimizers from the running checkpoint. A collective."""
        assert self._running is not None
        initial = {"state_dict": trainer.lightning_module.state_dict()}
        states: list[Any] = self._running.restore(initial=initial).checkpoint["optimizer_states"]
        rank_zero_info(f"Optimizer states from the running checkpoint {self.dirpath}: {self._running.recovery}")
        return states

    def _open(self, trainer: pl.Trainer, ticket: ReplacementTicket | None = None, due: Any = None) -> RunningCheckpoint:
        assert self._io is not None
        ranks = Ranks.of_default_group() if ticket is None else Ranks(trainer.global_rank, trainer.world_size)
        running = RunningCheckpoint(self.dirpath, self._settings, self._options.storage_options, ranks, ticket)
        self._running, self.stats = running, running.stats
        self._schedule.begin(self._steps.of(trainer), running, due)
        self._io.attach(running)
        self._logged_saves = 0
        private.after_batches(trainer, partial(self._after_batch, trainer))
        others = [c for c in trainer.callbacks if c is not self and not isinstance(c, Fences)]  # type: ignore[attr-defined]
        # A new list, because Lightning iterates over the present one.
        trainer.callbacks = [Fences(running, self._schedule.pause), *others, self]  # type: ignore[attr-defined]
        self._steps.watch(trainer, before_outside_step=self.fence)
        return running

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say whether a finished run trains on. Lightning has restored the callbacks, which may stop it."""
        if self._start is not None:
            self._finished_here = self._start.is_over()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on from a save. Lightning has restored its loops."""
        self._steps.start_batch(trainer)
        if self._running is None:
            return
        if self._start is not None:
            self._start.go_on()
            self._start = None
        self._schedule.begin(self._steps.of(trainer), self._running)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save everything, and mark the run as finished unless it was only stopped."""
        if self._running is None:
            return
        signum = self._preemption.received
        self._finished_here = signum is None and not private.time_is_up(trainer)
        # A run whose time is up was saved in the middle of its epoch, which Lightning has since closed.
        if self._finished_here or self._steps.of(trainer) != self._schedule.last_full_step:
            self._save(trainer, full=True, finished=self._finished_here)
            self._running.fence()
        self._log(trainer)
        if signum is not None:
            self._preemption.stop(trainer, signum)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save the present state."""
        if self._running is None:
            return self._close(trainer)
        # Before the training starts, the state may be restored in part only.
        saves = self._preemption.saves(trainer, exception, self._options.save_on_exception) and self._start is None
        try:
            if saves and self._steps.of(trainer) != self._schedule.last_full_step:
                self._save(trainer, full=True)
            self._close(trainer)
        except Exception as error:
            # Only a warning, so that the user sees the first exception.
            warnings.warn(f"lightning-scar: the last save failed, too: {error!r}", stacklevel=2)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wait for the last write, and raise or warn about failed ones."""
        try:
            self._close(trainer)
        finally:
            self._preemption.end()

    def _close(self, trainer: pl.Trainer) -> None:
        private.end_interception(trainer)
        private.end_after_batches(trainer)
        TrainingData.of(trainer).remove()
        if self._start is not None:
            self._start.end()
        added = (Fences, Preemption)
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, added)]  # type: ignore[attr-defined]
        running, self._running, self._start = self._running, None, None
        if running is None:
            return
        self._schedule.end()
        self._steps.end()
        if self._io is not None:
            self._io.detach(running)
        running.close()

    # -- saves ---------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Note that a batch is over. A save that is due follows the LightningModule's hook, which may change state."""
        self._steps.count_batch(trainer)
        self._is_batch_over = self._running is not None

    def _after_batch(self, trainer: pl.Trainer) -> None:
        """Start a save if one is due; :class:`~lightning_scar.lightning.fences.Fences` completes it."""
        if not self._is_batch_over:
            return  # The batch is of another one's training in this fit, such as the search for a learning rate.
        assert self._running is not None
        self._is_batch_over = False
        self._log(trainer)
        self._steps.count_batch(trainer)
        self._steps.start_batch(trainer)
        moment.keep_random(trainer)
        step = self._steps.of(trainer)
        if not self._schedule.is_new(step):
            return
        if (signum := self._preemption.received) is not None:
            if signum != signal.SIGINT or self._options.save_on_exception:
                self._save(trainer, full=True, after_batch=True)
                self._running.flush()
            self._preemption.proceed(trainer)
        elif trainer.should_stop and private.time_is_up(trainer):
            self._save(trainer, full=True, after_batch=True)
        elif (due := self._schedule.due(step)) is not None:
            if due.common and self._healer.is_due(self._running):
                self.heal(trainer)
            self._save(trainer, full=due.full, after_batch=True)

    def _save(self, trainer: pl.Trainer, full: bool, finished: bool = False, after_batch: bool = False) -> None:
        assert self._running is not None
        step = self._steps.of(trainer)
        self._schedule.note(step, full)
        info = {"finished": finished, "global_step": trainer.global_step, "epoch": trainer.current_epoch}
        info["stopped"] = finished and trainer.should_stop
        parts = live_parts(trainer.optimizers, trainer.lightning_module)
        checkpoint = moment.dump(trainer, "batch end" if after_batch else None)
        self._running.save(checkpoint, step, **parts, full=full, info=info)
        self._running.stage()

    def heal(self, trainer: pl.Trainer) -> bool:
        """Restore the blocks of the live run that became NaN or Inf, with their optimizer state, and warn about it.

        With several ranks, this is a collective, which all must call between the same two optimizer steps.

        Args:
            trainer: The trainer, in ``fit``.

        Returns:
            Whether anything was restored, on any rank.

        Raises:
            IncompleteError: If there is no finite version of a block.
            RuntimeError: If this happened more than ``max_heals`` times.

        """
        assert self._running is not None, "call heal() during fit"
        parts = live_parts(trainer.optimizers, trainer.lightning_module)
        return self._healer.heal(self._running, private.dump_checkpoint(trainer), self._steps.of(trainer), **parts)

    def _log(self, trainer: pl.Trainer) -> None:
        if self.stats.saves == self._logged_saves:
            return
        self._logged_saves = self.stats.saves
        loggers.log_stats(trainer, self.stats)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the number of optimizer steps that Lightning does not count."""
        return {"outside_steps": self._steps.outside}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a :meth:`state_dict`."""
        self._steps.outside = state_dict["outside_steps"]
