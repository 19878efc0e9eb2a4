"""How the model and the optimizers of a ``fit`` load a running checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_scar.core.blocks import BlockMap
from lightning_scar.core.compatibility import ModelMismatchError
from lightning_scar.core.loading import load_model
from lightning_scar.core.optimizer_loading import load_optimizers, owners_of_states
from lightning_scar.lightning import private


class ModelLoading:
    """Lets the model load what Lightning hands it, explains what it refuses, and loads what fits if that is wanted.

    Args:
        trainer: The trainer, before it loads the checkpoint.
        path: The path of the checkpoint.
        strict: Whether a checkpoint of another model is an error.
        block_map: The map that it was saved with.

    """

    def __init__(self, trainer: pl.Trainer, path: str, strict: bool, block_map: BlockMap) -> None:
        self._trainer = trainer
        self._path = path
        self._strict = strict
        self._owners = owners_of_states(block_map)
        self._is_same_model = True

    def intercept(self) -> None:
        """Take part when Lightning loads the model and the optimizers."""
        private.intercept_loading(self._trainer, self._load_model, self._load_optimizers)

    def _load_model(self, load: Any, checkpoint: Mapping[str, Any], strict: bool) -> None:
        def attempt(module: Any, state_dict: Mapping[str, Any], leniently: bool) -> None:
            load({**checkpoint, "state_dict": state_dict}, strict=strict and not leniently)

        modules = {"": self._trainer.lightning_module}
        self._is_same_model = load_model(self._path, modules, checkpoint["state_dict"], self._strict, attempt)

    def _load_optimizers(self, load: Any, checkpoint: Mapping[str, Any]) -> None:
        def attempt(states: Sequence[Any]) -> None:
            load({**checkpoint, "optimizer_states": states})

        load_optimizers(
            self._path,
            self._trainer.optimizers,
            checkpoint["optimizer_states"],
            attempt,
            owners=self._owners,
            live=self._trainer.lightning_module.state_dict(),
            strict=self._strict,
            is_same_model=self._is_same_model,
        )


def check_is_of_a_trainer(path: str, checkpoint: Mapping[str, Any]) -> None:
    """Check that a Trainer wrote a checkpoint.

    Args:
        path: The path of the checkpoint.
        checkpoint: The checkpoint dict.

    Raises:
        ModelMismatchError: If a loop wrote it.

    """
    if "loop" in checkpoint:
        raise ModelMismatchError(
            f"{path} was written by a loop, so a Trainer cannot resume from it. Use another dirpath. To start from its "
            f"weights, `model.load_state_dict(lightning_scar.load({path!r})['state_dict'])`."
        )
