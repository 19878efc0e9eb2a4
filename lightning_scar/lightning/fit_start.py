"""What a ``fit`` with a ``SCARCheckpoint`` begins with."""

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
    """Decides what a ``fit`` goes on from, restores it, and puts the data where they were.

    Args:
        trainer: Whose fit.
        running: The callback's running checkpoint, just opened.
        resumes: Whether to go on from it without being asked.
        strict: Whether a running checkpoint of another model is an error.
        storage_options: Of its file system.

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

        As the first rank sees it, since hosts differ in what they have in memory.
        """
        heads = newest_heads(self._running).values()
        step: int = self._running.ranks.gather(max((head.step for head in heads), default=-1))[0]
        return step

    def intercept(self) -> None:
        """Takes the decision when the Trainer is about to read what it was asked for."""
        private.intercept_resume(self._trainer, self._choose)

    def _choose(self, asked_for: str | os.PathLike[str] | None, weights_only: bool | None) -> Any:
        check_ranks_agree(self._running.ranks, self._trainer.lightning_module.state_dict())
        goes_on = self._is_own(asked_for) if asked_for else self._resumes and self._is_unfinished()
        return self._restore(weights_only) if goes_on else asked_for

    def _is_own(self, path: str | os.PathLike[str]) -> bool:
        return Directory(path, self._storage_options).path == self._running.store.directory.path

    def _is_unfinished(self) -> bool:
        """Whether there is a run that was cut short. A collective.

        Raises:
            MisconfigurationException: If it is finished: going on from it must be asked for.
            NoCheckpointError: If there is nothing left but damaged files.

        """
        ranks = self._running.ranks

        def look() -> bool:
            check_not_all_damaged(self._running)
            heads = newest_heads(self._running).values()
            if heads and all(head.info.get("finished") for head in heads):
                raise MisconfigurationException(
                    f"{self._dirpath} holds a finished run ({max(head.step for head in heads)} steps). To train on "
                    f"from it, pass `ckpt_path={self._dirpath!r}` to fit; to begin anew, choose another dirpath, or "
                    "set `resume=False`, which replaces it."
                )
            return bool(heads)

        is_unfinished: bool = ranks.gather(ranks.together(look))[0]
        return is_unfinished

    def _restore(self, weights_only: bool | None) -> dict[str, Any]:
        trainer, running = self._trainer, self._running
        # Blocks of which nothing is left on disk begin anew.
        initial = {"state_dict": trainer.lightning_module.state_dict()}
        restored = running.restore(weights_only, initial)
        checkpoint = restored.checkpoint
        fit_to_model(self._dirpath, checkpoint, trainer.lightning_module, self._strict)
        private.take_loader_states(checkpoint, restored.own)
        self._loader_states = private.loader_states(checkpoint)
        self._are_other_ranks = restored.world_size != trainer.world_size
        if self._are_other_ranks:
            private.share_out_epoch(checkpoint, restored.world_size, trainer.world_size)
        rank_zero_info(
            f"Resuming from the running checkpoint {self._dirpath}: step {checkpoint['global_step']}, "
            f"{running.recovery}"
        )
        return checkpoint

    def place_data(self) -> None:
        """Puts the data where they were; loops and loaders are restored by now."""
        if self._loader_states:
            private.place_data(self._trainer, self._loader_states, skip=self._are_other_ranks)
            self._loader_states = []


def fit_to_model(path: str, checkpoint: dict[str, Any], module: pl.LightningModule, strict: bool) -> None:
    """Makes sure that a running checkpoint fits a model.

    Args:
        path: Where it lies.
        checkpoint: The checkpoint dict; what does not fit is dropped from it unless ``strict``.
        module: The model.
        strict: Whether a difference is an error.

    Raises:
        ModelMismatchError: If it does not fit; every difference is listed. Or if a loop wrote it.

    """
    if "loop" in checkpoint:
        raise ModelMismatchError(
            f"{path} was written by a loop, so a Trainer cannot go on from it. Use another dirpath; to start from its "
            f"weights, `model.load_state_dict(lightning_scar.load({path!r})['state_dict'])`."
        )
    if is_overridden("on_load_checkpoint", module):
        return  # The user's hook may be there to make it fit.
    live = module.state_dict()
    # Who need not have everything must have what there is in its shape.
    kinds = ("",) if module.strict_loading else ("reshaped",)
    if not check_fit(path, checkpoint, live, strict, kinds):
        module.strict_loading = False
