"""How the model and the optimizers of a ``fit`` load a running checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_scar.core.blocks import BlockMap
from lightning_scar.core.compatibility import ModelMismatchError
from lightning_scar.core.loading import load_model
from lightning_scar.core.optimizer_loading import load_optimizers, owners_of_states


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
        intercept_loading(self._trainer, self._load_model, self._load_optimizers)

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
            saved_model=checkpoint["state_dict"],
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


def intercept_loading(trainer: pl.Trainer, model: Callable[..., None], optimizers: Callable[..., None]) -> None:
    """Let someone take part when the strategy next loads the model, and the optimizers.

    Args:
        trainer: The trainer, before the checkpoint is loaded.
        model: Receives the strategy's method that loads the model, and its arguments.
        optimizers: The same for the optimizers.

    """
    strategy = trainer.strategy
    of_model, of_optimizers = strategy.load_model_state_dict, strategy.load_optimizer_state_dict

    def load_model_state_dict(checkpoint: Any, strict: bool = True) -> None:
        del strategy.load_model_state_dict
        model(of_model, checkpoint, strict)

    def load_optimizer_state_dict(checkpoint: Any) -> None:
        del strategy.load_optimizer_state_dict
        optimizers(of_optimizers, checkpoint)

    strategy.load_model_state_dict = load_model_state_dict  # type: ignore[method-assign]
    strategy.load_optimizer_state_dict = load_optimizer_state_dict  # type: ignore[method-assign]


def end_interception(trainer: pl.Trainer) -> None:
    """Undo :func:`intercept_loading`, if a call failed before all was loaded."""
    for name in ("load_model_state_dict", "load_optimizer_state_dict"):
        vars(trainer.strategy).pop(name, None)
