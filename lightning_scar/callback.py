"""``SCARCheckpoint``: when to save, and what to resume from."""

import os
import threading
import warnings
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_scar import _lightning, joining
from lightning_scar.calls import calls
from lightning_scar.checkpoint_io import SCARCheckpointIO, installed_io
from lightning_scar.core.claim import Seat
from lightning_scar.core.compatibility import check_ranks_agree
from lightning_scar.core.healer import Healer
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.resumption import newest_step
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.selection import Candidates
from lightning_scar.core.settings import PolicyName, Settings
from lightning_scar.core.stats import Stats
from lightning_scar.fences import Fences, before_optimizer_steps
from lightning_scar.refusals import (
    as_misconfiguration,
    check_strategy,
)
from lightning_scar.resumption import fit_to_model, unfinished_run
from lightning_scar.schedule import Schedule, check_intervals
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.tiers import open_store
from lightning_scar.trainer_sigterm import TrainerSigterm


class SCARCheckpoint(Checkpoint):
    """Saves the blocks that moved furthest, often, and resumes from them by itself.

    The first save is full; the later ones write the fraction of the state that moved furthest since it was saved (SCAR,
    ICML 2019, section 4.2). When ``fit`` begins and ``dirpath`` holds the running checkpoint of a run that was cut
    short, training goes on from there. At the end of ``fit`` one full save marks the run as finished.

    Args:
        dirpath: The running checkpoint's directory, a path or any fsspec URL.
        every_n_train_steps: Save every so many optimizer steps.
        every_n_seconds: Save every so many seconds, at the next optimizer step. Give one of the two.
        fraction: The share of the state's bytes that one save may write, in (0, 1].
        policy: ``"distance"``, ``"round_robin"``, ``"random"``, or a function from
            :class:`~lightning_scar.core.selection.Candidates` to one priority a block.
        block_size: Bytes of a parameter's rows in a block; ``None`` aims at 4096 blocks of 4 KiB to 4 MiB.
        max_age: Steps after which a block is due whatever its priority; ``None`` for never.
        full_every_n_saves: Make every so-manieth save a full one, so that ``load(dirpath, consistent=True)`` finds a
            recent state of one single step; ``None`` for the first and the last only.
        staging: ``"lazy"`` scores and copies beside the next forward and backward, ``"eager"`` at once.
        resume: Whether to go on from what ``dirpath`` holds. ``False`` begins anew, over it.
        strict: Whether a running checkpoint of another model is an error; ``False`` loads what fits.
        save_on_exception: Whether to save when training ends with an exception or Ctrl-C.
        on_write_error: ``"warn"`` goes on training when a save cannot be written, ``"raise"`` stops it.
        heal_non_finite: Whether to look for NaN and Inf before every save, and to restore the blocks that hold any, on
            all ranks at the same step; see :meth:`heal`.
        max_heals: How often that may happen in one ``fit``; after that it is an error.
        memory: Whether saves go to this host's memory first, which outlives the processes (``/dev/shm``, or what the
            environment variable ``LIGHTNING_SCAR_MEMORY`` names).
        durable_every_n_saves: With it, every how-manieth save goes to ``dirpath``, too; full ones always do.
        replicas: With it, on how many other hosts each rank keeps a copy, for the loss of its host.
        memory_limit: Bytes of memory that each rank may take, and each of its copies; ``None`` for what there is.
        storage_options: Passed to the file system of ``dirpath``.

    Raises:
        MisconfigurationException: If a value is out of range, if there is not exactly one interval, or for a sharded
            strategy.
        StorageError: When ``fit`` begins, if ``dirpath`` holds something else, a newer format, or is not the same
            directory on all ranks.
        DirectoryInUseError: When ``fit`` begins, if another live run uses ``dirpath``.
        ModelMismatchError: When ``fit`` begins, if another model wrote the running checkpoint.

    Example::

        >>> from lightning_scar import SCARCheckpoint
        >>> from lightning.pytorch import Trainer
        >>> scar = SCARCheckpoint("runs/a/scar", every_n_train_steps=25, fraction=0.125)
        >>> trainer = Trainer(callbacks=[scar], logger=False, enable_progress_bar=False, accelerator="cpu")
        >>> # trainer.fit(model, datamodule)      # the second time it resumes by itself

    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        *,
        every_n_train_steps: int | None = None,
        every_n_seconds: float | None = None,
        fraction: float = 0.125,
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
        with as_misconfiguration():
            in_memory = memory, durable_every_n_saves, replicas, memory_limit
            self._settings = Settings(fraction, policy, block_size, max_age, staging, on_write_error, *in_memory)
            intervals = {"every_n_train_steps": every_n_train_steps, "every_n_seconds": every_n_seconds}
            check_intervals(full_every_n_saves, **intervals)
            self._healer = Healer(heal_non_finite, max_heals)
        self.dirpath = os.fspath(dirpath)
        self._schedule = Schedule(every_n_train_steps, every_n_seconds, full_every_n_saves)
        self._resume = resume
        self._strict = strict
        self._save_on_exception = save_on_exception
        self._storage_options = storage_options
        self.stats = Stats()
        self._running: RunningCheckpoint | None = None
        self._io: SCARCheckpointIO | None = None
        self._sigterm: TrainerSigterm | None = None
        self._step_watch: RemovableHandle | None = None
        self._global_step = 0
        self._outside_steps = 0
        self._stepped_outside = False
        self._logged_saves = 0
        self._loader_states: list[Any] = []
        self._are_other_ranks = False
        self._finished_here = False

    @property
    def best_model_path(self) -> str:
        """What ``ckpt_path="best"`` loads when this is the Trainer's only checkpoint callback."""
        return "" if open_store(self.dirpath, self._storage_options).is_empty() else self.dirpath

    @best_model_path.setter
    def best_model_path(self, path: str) -> None:
        """Launchers hand it over from the processes they started; here the directory itself tells."""

    # -- beginning and end of a fit ------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes the directory and decides what to resume from."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        check_strategy(trainer)
        self._io = installed_io(trainer, self._storage_options)
        if stage != "fit" or joining.is_joiner(trainer):
            return
        self._open(trainer)
        kept = calls.kept()
        if kept is not None and kept.step >= self._newest_step():
            return
        _lightning.intercept_resume(
            trainer,
            lambda asked_for: self._path_to_resume(trainer, asked_for),
            lambda path, checkpoint: self._loaded(trainer, path, checkpoint),
        )

    def hand_over(self) -> Seat | None:
        """What the same callback needs in a process that takes the place of a rank that died."""
        return self._running.seat if self._running is not None else None

    def take_over(self, trainer: pl.Trainer, seat: Seat | None) -> None:
        """Goes on saving in the place of a rank that died; ``seat`` is from :meth:`hand_over` of another rank."""
        if seat is not None:
            self._open(trainer, seat)
            self._schedule.begin(self._step(trainer))

    def fence(self) -> None:
        """Waits until the save under way is copied; to be called before anything but an optimizer changes weights."""
        if self._running is not None:
            self._running.fence()

    def save_all(self, trainer: pl.Trainer) -> None:
        """Saves all blocks of this rank, for the next start of this job to go on from."""
        if self._running is not None:
            self._begin(trainer, full=True)
            self._running.suspend()

    def optimizer_states(self) -> list[Any]:
        """The states of all optimizers, from the running checkpoint. A collective."""
        assert self._io is not None
        assert self._running is not None
        states: list[Any] = self._io.load_checkpoint(self.dirpath)["optimizer_states"]
        rank_zero_info(f"Optimizer states from the running checkpoint {self.dirpath}: {self._running.recovery}")
        return states

    def _open(self, trainer: pl.Trainer, seat: Seat | None = None) -> None:
        assert self._io is not None
        ranks = Ranks.of_default_group() if seat is None else Ranks(trainer.global_rank, trainer.world_size)
        with as_misconfiguration():
            self._healer.check(ranks.world_size, every_n_train_steps=self._schedule.every_n_steps)
        running = RunningCheckpoint(self.dirpath, self._settings, self._storage_options, ranks, seat)
        self._running, self.stats = running, running.stats
        self._io.attach(self.dirpath, running, lambda: {"state_dict": trainer.lightning_module.state_dict()})
        self._logged_saves = 0
        others = [c for c in trainer.callbacks if c is not self and not isinstance(c, Fences)]  # type: ignore[attr-defined]
        # A new list: Lightning is walking over the present one.
        trainer.callbacks = [Fences(running), *others, self]  # type: ignore[attr-defined]
        self._step_watch = before_optimizer_steps(trainer, self._before_outside_step)

    def _newest_step(self) -> int:
        """As the first rank sees it, since hosts differ in what they have in memory."""
        assert self._running is not None
        step: int = self._running.ranks.gather(newest_step(self.dirpath, self._storage_options))[0]
        return step

    def _path_to_resume(self, trainer: pl.Trainer, asked_for: str | None) -> str | None:
        assert self._running is not None
        check_ranks_agree(self._running.ranks, trainer.lightning_module.state_dict())
        if asked_for or not self._resume or self._finished_here:
            return asked_for
        ranks = self._running.ranks
        path: str | None = ranks.gather(ranks.together(lambda: unfinished_run(self.dirpath, self._storage_options)))[0]
        return path

    def _loaded(self, trainer: pl.Trainer, path: str, checkpoint: dict[str, Any]) -> None:
        if not self._is_own(path):
            return
        fit_to_model(path, checkpoint, trainer.lightning_module, self._strict)
        self._loader_states = _lightning.loader_states(checkpoint)
        before = self._running.restored_ranks if self._running is not None else trainer.world_size
        self._are_other_ranks = before != trainer.world_size
        if self._are_other_ranks:
            _lightning.share_out_epoch(checkpoint, before, trainer.world_size)
        found = f", {self._running.recovery}" if self._running is not None else "."
        rank_zero_info(f"Resuming from the running checkpoint {path}: step {checkpoint['global_step']}{found}")

    def _is_own(self, path: str) -> bool:
        return Directory(path, self._storage_options).path == Directory(self.dirpath, self._storage_options).path

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's signal handlers are in place, and loops and loaders restored."""
        if self._loader_states:
            _lightning.place_data(trainer, self._loader_states, skip=self._are_other_ranks)
            self._loader_states = []
        self._global_step = trainer.global_step
        self._schedule.begin(self._step(trainer))
        if self._running is not None and threading.current_thread() is threading.main_thread():
            self._sigterm = TrainerSigterm(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves everything, and marks the run as finished unless it was merely told to stop."""
        if self._running is None:
            return
        told_to_stop = self._sigterm is not None and self._sigterm.received
        self._finished_here = not told_to_stop and not _lightning.time_is_up(trainer)
        # A run whose time is up was saved in the middle of its epoch. By now Lightning has closed the epoch.
        if self._finished_here or self._step(trainer) != self._schedule.last_full_step:
            self._begin(trainer, full=True, finished=self._finished_here)
            self._running.fence()
        self._log(trainer)
        if self._sigterm is not None and told_to_stop:
            self._sigterm.proceed()
            raise SIGTERMException

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Saves what there is."""
        if self._running is None:
            return self._close(trainer)
        try:
            if self._save_on_exception and trainer.training and self._step(trainer) != self._schedule.last_full_step:
                self._begin(trainer, full=True)
            self._close(trainer)
        except Exception as error:
            # The exception under way is the one that the user must see.
            warnings.warn(f"lightning-scar: the last save failed too: {error!r}", stacklevel=2)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Waits for the last write, and raises or warns about failed ones."""
        self._close(trainer)

    def _close(self, trainer: pl.Trainer) -> None:
        _lightning.end_interception(trainer)
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, Fences)]  # type: ignore[attr-defined]
        running, self._running = self._running, None
        if running is None:
            return
        if self._step_watch is not None:
            self._step_watch.remove()
            self._step_watch = None
        if self._sigterm is not None:
            self._sigterm.restore()
            self._sigterm = None
        if self._io is not None:
            self._io.detach(self.dirpath)
        running.close()

    # -- saves ---------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begins a save when one is due; :class:`~lightning_scar.fences.Fences` sees to the rest."""
        if self._running is None:
            return
        self._log(trainer)
        if self._stepped_outside and trainer.global_step == self._global_step:
            self._outside_steps += 1
        self._stepped_outside, self._global_step = False, trainer.global_step
        step = self._step(trainer)
        if not self._schedule.is_new(step):
            return
        if self._sigterm is not None and self._sigterm.received:
            self._begin(trainer, full=True)
            self._running.fence()
            self._sigterm.proceed()
        elif trainer.should_stop and _lightning.time_is_up(trainer):
            self._begin(trainer, full=True)
        elif self._schedule.is_due(step):
            if self._healer.is_due(self._running):
                self.heal(trainer)
            self._begin(trainer, full=self._schedule.is_full(step))

    def _begin(self, trainer: pl.Trainer, full: bool, finished: bool = False) -> None:
        assert self._io is not None
        step = self._step(trainer)
        self._schedule.note(step, full)
        options = {
            "step": step,
            **_live_parts(trainer),
            "full": full,
            "info": {"finished": finished, "global_step": trainer.global_step, "epoch": trainer.current_epoch},
        }
        self._io.save_checkpoint(_lightning.dump_checkpoint(trainer), self.dirpath, storage_options=options)

    def heal(self, trainer: pl.Trainer) -> bool:
        """Restores the blocks of the live run that turned NaN or Inf, with their optimizer rows, and warns of it.

        With several ranks a collective, to be called by all between the same two optimizer steps.

        Args:
            trainer: The trainer, whose ``fit`` is under way.

        Returns:
            Whether anything had to be restored, on any rank.

        Raises:
            IncompleteError: If there is no finite version of a block.
            RuntimeError: If it happened more than ``max_heals`` times.

        """
        assert self._running is not None, "heal() needs a fit under way"
        checkpoint, step = _lightning.dump_checkpoint(trainer), self._step(trainer)
        return self._healer.heal(self._running, checkpoint, step, **_live_parts(trainer))

    def _step(self, trainer: pl.Trainer) -> int:
        return trainer.global_step + self._outside_steps

    def _before_outside_step(self, optimizer: Optimizer) -> None:
        self._stepped_outside = True
        if self._running is not None:
            self._running.fence()

    def _log(self, trainer: pl.Trainer) -> None:
        if self.stats.saves == self._logged_saves:
            return
        self._logged_saves = self.stats.saves
        metrics = {f"scar/{name}": float(value) for name, value in vars(self.stats).items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=_lightning.logger_step(trainer))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Steps of optimizers that Lightning does not count."""
        return {"outside_steps": self._outside_steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._outside_steps = state_dict["outside_steps"]


def _live_parts(trainer: pl.Trainer) -> dict[str, Any]:
    """What pairs optimizer state with parameters, and tells what optimizers change from what may change at any time."""
    return {
        "optimizers": {("optimizer_states", i): optimizer for i, optimizer in enumerate(trainer.optimizers)},
        "parameters": trainer.lightning_module.parameters(),
    }
