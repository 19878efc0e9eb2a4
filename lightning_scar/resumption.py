"""What a run resumes from, and whether it fits."""

from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_scar.core.compatibility import ModelMismatchError, check_fit
from lightning_scar.core.resumption import newest_heads


def unfinished_run(dirpath: str, storage_options: dict[str, Any] | None) -> str | None:
    """The directory, if it holds a run that was cut short; ``None`` if it holds none.

    Raises:
        MisconfigurationException: If the run is finished: going on from it must be asked for.
        NoCheckpointError: If there is nothing left but damaged files: beginning anew must be asked for.

    """
    heads = newest_heads(dirpath, storage_options)
    if not heads:
        return None
    if all(head.info.get("finished") for head in heads.values()):
        step = max(head.step for head in heads.values())
        raise MisconfigurationException(
            f"{dirpath} holds a finished run ({step} steps). To train on from it, pass `ckpt_path={dirpath!r}` "
            "to fit; to begin anew, choose another dirpath, or set `resume=False`, which replaces it."
        )
    return dirpath


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
