"""What a ``fit`` with a ``SCARCheckpoint`` resumes from."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_scar.core.compatibility import check_ranks_agree
from lightning_scar.core.options import Options
from lightning_scar.core.resumption import check_not_all_damaged, newest_heads
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.lightning import paths, private
from lightning_scar.lightning.model_loading import ModelLoading, check_is_of_a_trainer, end_interception
from lightning_scar.lightning.moment import Moment
from lightning_scar.lightning.private_loops import use_own_loader_states
from lightning_scar.storage.directory import Directory


class _Finished(NamedTuple):
    """A finished run that was loaded: its checkpoint dict, a summary, and whether something stopped it early."""

    checkpoint: dict[str, Any]
    summary: str
    was_stopped: bool


class FitStart:
    """Decides what a ``fit`` resumes from.

    Args:
        trainer: The trainer.
        running: The callback's running checkpoint, just opened.
        resumes: Whether to resume from it without ``ckpt_path``.
        options: The callback's options.

    """

    def __init__(
        self,
        trainer: pl.Trainer,
        running: RunningCheckpoint,
        resumes: bool,
        options: Options,
    ) -> None:
        self._trainer = trainer
        self._running = running
        self._resumes = resumes
        self._strict = options.strict
        self._storage_options = options.storage_options
        self._dirpath = str(running.store.directory)
        self._finished: _Finished | None = None
        self._sanity_steps: int | float | None = None
        self._moment: Moment | None = None

    @property
    def newest_step(self) -> int:
        """The step of the newest save; -1 if there is none. A collective.

        The first rank decides, because the hosts have different files in memory.
        """
        heads = newest_heads(self._running).values()
        step: int = self._running.ranks.gather(max((head.step for head in heads), default=-1))[0]
        return step

    def intercept(self) -> None:
        """Decide when the Trainer is about to read ``ckpt_path``."""
        private.intercept_resume(self._trainer, self._choose)

    def _choose(self, asked_for: str | os.PathLike[str] | None, weights_only: bool | None) -> Any:
        check_ranks_agree(self._running.ranks, self._trainer.lightning_module.state_dict())
        self._running.read_back.expect(weights_only)
        is_of_slurm = paths.is_chosen_on_slurm(self._trainer, asked_for)
        is_asked_for = bool(asked_for) and not is_of_slurm
        if not (self._is_own(asked_for) if asked_for and not is_of_slurm else self._resumes):
            return asked_for
        found = self._newest_infos(may_be_damaged=is_asked_for)
        if not found and not is_asked_for:
            return asked_for
        if is_of_slurm and self._is_newer(str(asked_for), found, weights_only):
            return asked_for
        checkpoint = self._restore(weights_only)
        summary = f"step {checkpoint['global_step']}, {self._running.recovery}"
        if found and all(info.get("finished") for info in found):
            self._finished = _Finished(checkpoint, summary, any(info.get("stopped") for info in found))
            # What stopped the run, such as EarlyStopping, is over: only who asks for it trains on.
            self._trainer.should_stop = self._finished.was_stopped and not is_asked_for
        else:
            rank_zero_info(f"Resuming from the running checkpoint {self._dirpath}: {summary}")
        return checkpoint

    def _is_own(self, path: str | os.PathLike[str]) -> bool:
        return Directory(path, self._storage_options).path == self._running.store.directory.path

    def _newest_infos(self, may_be_damaged: bool) -> list[Mapping[str, Any]]:
        """Return what the writers of the newest saves noted. A collective: the first rank decides.

        Raises:
            NoCheckpointError: If only damaged files are left.

        """

        def look() -> list[Mapping[str, Any]]:
            if not may_be_damaged:
                check_not_all_damaged(self._running)
            return [head.info for head in newest_heads(self._running).values()]

        ranks = self._running.ranks
        infos: list[Mapping[str, Any]] = ranks.gather(ranks.together(look))[0]
        return infos

    def _is_newer(self, path: str, found: list[Mapping[str, Any]], weights_only: bool | None) -> bool:
        """Return whether Lightning's checkpoint on SLURM is newer than the running checkpoint, and say so."""

        def read() -> tuple[int, str]:
            try:
                return paths.step_of(path, weights_only), ""
            except Exception as error:
                return -1, repr(error)

        ranks, newest = self._running.ranks, max(info["global_step"] for info in found)
        step, error = ranks.gather(read() if ranks.rank == 0 else None)[0]
        ours = f"the running checkpoint {self._dirpath} (step {newest})"
        theirs = f"Lightning's checkpoint {path} (step {step})"
        if error:
            rank_zero_warn(f"lightning-scar: {path} cannot be read: {error}. Resuming from {ours}")
        elif step > newest:
            rank_zero_info(f"lightning-scar: {theirs} is newer than {ours}: resuming from the first")
        else:
            word = "newer than" if newest > step else "as new as"
            rank_zero_info(f"lightning-scar: {ours} is {word} {theirs}: resuming from the first")
        return bool(step > newest)

    def _restore(self, weights_only: bool | None) -> dict[str, Any]:
        trainer, running = self._trainer, self._running
        # Blocks without any version on disk get their initial values.
        initial = {"state_dict": trainer.lightning_module.state_dict()}
        restored = running.restore(weights_only, initial)
        checkpoint = restored.checkpoint
        check_is_of_a_trainer(self._dirpath, checkpoint)
        ModelLoading(trainer, self._dirpath, self._strict, restored.map).intercept()
        use_own_loader_states(checkpoint, restored.own)
        own = restored.own if restored.world_size == trainer.world_size else None
        self._moment = Moment(trainer, checkpoint, own)
        return checkpoint

    def is_over(self) -> bool:
        """Return whether a finished run has nothing left to train, so that ``fit`` returns at once; say what follows.

        Call it once, when Lightning has restored the callbacks, any of which may stop the training.
        """
        trainer, finished, self._finished = self._trainer, self._finished, None
        if finished is None:
            return False
        ends = private.is_over(trainer, finished.checkpoint)
        if not ends:
            follows = f"It trains on: max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}"
        elif finished.was_stopped:
            follows = f"It was stopped early, so fit only loads it; to train on, pass ckpt_path={self._dirpath!r}"
        else:
            follows = "Nothing is left to train, so fit only loads it"
        rank_zero_info(f"lightning-scar: {self._dirpath} holds a finished run: {finished.summary} {follows}.")
        if ends:
            # There is no training that Lightning's sanity check would protect.
            self._sanity_steps, trainer.num_sanity_val_steps = trainer.num_sanity_val_steps, 0
        return ends

    def end(self) -> None:
        """Undo what was changed in the trainer for this ``fit`` only."""
        end_interception(self._trainer)
        if self._sanity_steps is not None:
            self._trainer.num_sanity_val_steps, self._sanity_steps = self._sanity_steps, None

    def go_on(self) -> None:
        """Go on from the moment of the save, when Lightning has restored loops and loaders."""
        self.end()
        if self._moment is not None:
            self._moment.go_on()
