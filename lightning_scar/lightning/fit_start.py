"""What a ``fit`` with a ``SCARCheckpoint`` resumes from."""

import os
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_scar.core.compatibility import ModelMismatchError, check_fit, check_ranks_agree
from lightning_scar.core.resumption import check_not_all_damaged, newest_heads
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.lightning import private
from lightning_scar.storage.directory import Directory


class FitStart:
    """Decides what a ``fit`` resumes from, and restores it and the data position.

    Args:
        trainer: The trainer.
        running: The callback's running checkpoint, just opened.
        resumes: Whether to resume from it without ``ckpt_path``.
        strict: Whether a running checkpoint of another model is an error.
        storage_options: Arguments of its file system.

    """

    def __init__(
        self,
        trainer: pl.Trainer,
        running: RunningCheckpoint,
        resumes: bool,
        strict: bool,
        storage_options: dict[str, Any] | None,
    ) -> None:
        self._trainer = trainer
        self._running = running
        self._resumes = resumes
        self._strict = strict
        self._storage_options = storage_options
        self._dirpath = str(running.store.directory)
        self._loader_states: list[Any] = []
        self._are_other_ranks = False

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
        goes_on = self._is_own(asked_for) if asked_for else self._resumes and self._is_unfinished()
        return self._restore(weights_only) if goes_on else asked_for

    def _is_own(self, path: str | os.PathLike[str]) -> bool:
        return Directory(path, self._storage_options).path == self._running.store.directory.path

    def _is_unfinished(self) -> bool:
        """Return whether there is an interrupted run. A collective.

        Raises:
            MisconfigurationException: If the run is finished, so that resuming requires ``ckpt_path``.
            NoCheckpointError: If only damaged files are left.

        """
        ranks = self._running.ranks

        def look() -> bool:
            check_not_all_damaged(self._running)
            heads = newest_heads(self._running).values()
            if heads and all(head.info.get("finished") for head in heads):
                raise MisconfigurationException(
                    f"{self._dirpath} holds a finished run ({max(head.step for head in heads)} steps). To continue it, "
                    f"pass `ckpt_path={self._dirpath!r}` to fit. To start a new run, choose another dirpath, or set "
                    "`resume=False`, which overwrites it."
                )
            return bool(heads)

        is_unfinished: bool = ranks.gather(ranks.together(look))[0]
        return is_unfinished

    def _restore(self, weights_only: bool | None) -> dict[str, Any]:
        trainer, running = self._trainer, self._running
        # Blocks without any version on disk get their initial values.
        initial = {"state_dict": trainer.lightning_module.state_dict()}
        restored = running.restore(weights_only, initial)
        checkpoint = restored.checkpoint
        check_fits_model(self._dirpath, checkpoint, trainer.lightning_module, self._strict)
        private.use_own_loader_states(checkpoint, restored.own)
        self._loader_states = private.loader_states(checkpoint)
        self._are_other_ranks = restored.world_size != trainer.world_size
        if self._are_other_ranks:
            private.share_out_epoch(checkpoint, restored.world_size, trainer.world_size)
        rank_zero_info(
            f"Resuming from the running checkpoint {self._dirpath}: step {checkpoint['global_step']}, "
            f"{running.recovery}"
        )
        return checkpoint

    def restore_data_position(self) -> None:
        """Restore the data position, after Lightning has restored loops and loaders."""
        if self._loader_states:
            private.restore_data_position(self._trainer, self._loader_states, skip=self._are_other_ranks)
            self._loader_states = []


def check_fits_model(path: str, checkpoint: dict[str, Any], module: pl.LightningModule, strict: bool) -> None:
    """Check that a running checkpoint fits a model.

    Args:
        path: The path of the checkpoint.
        checkpoint: The checkpoint dict; what does not fit is removed from it unless ``strict``.
        module: The model.
        strict: Whether a difference is an error.

    Raises:
        ModelMismatchError: If it does not fit, with a list of all differences, or if a loop wrote it.

    """
    if "loop" in checkpoint:
        raise ModelMismatchError(
            f"{path} was written by a loop, so a Trainer cannot resume from it. Use another dirpath. To start from its "
            f"weights, `model.load_state_dict(lightning_scar.load({path!r})['state_dict'])`."
        )
    if is_overridden("on_load_checkpoint", module):
        return  # The user's hook may make it fit.
    live = module.state_dict()
    # Without strict loading, keys may be missing, but shapes must match.
    kinds = ("",) if module.strict_loading else ("reshaped",)
    if not check_fit(path, checkpoint, live, strict, kinds):
        module.strict_loading = False
