"""What a run resumes from, and whether it fits."""

import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_scar.core.compatibility import ModelMismatchError, differences, keep_what_fits
from lightning_scar.core.restoration import NoCheckpointError
from lightning_scar.storage.store import DeltaStore


def unfinished_run(dirpath: str, storage_options: dict[str, Any] | None) -> str | None:
    """The directory, if it holds a run that was cut short; ``None`` if it holds none.

    Raises:
        MisconfigurationException: If the run is finished: going on from it must be asked for.
        NoCheckpointError: If there is nothing left but damaged files: beginning anew must be asked for.

    """
    store = DeltaStore(dirpath, storage_options)
    store.refresh()
    heads = [delta.head for delta in store.deltas if delta.head.lineage == store.index.lineage]
    if not heads and store.damaged:
        damage = "\n  ".join(map(str, store.damaged[:8]))
        raise NoCheckpointError(
            f"{dirpath} holds nothing but damaged files:\n  {damage}\n"
            "To begin anew, choose another dirpath, or set `resume=False`, which replaces them."
        )
    if not heads:
        return None
    newest = max(heads, key=lambda head: head.sequence)
    if newest.info.get("finished"):
        raise MisconfigurationException(
            f"{dirpath} holds a finished run ({newest.step} steps). To train on from it, pass `ckpt_path={dirpath!r}` "
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
        ModelMismatchError: If it does not fit; every difference is listed.

    """
    if is_overridden("on_load_checkpoint", module):
        return  # The user's hook may be there to make it fit.
    found = differences(checkpoint["state_dict"], module.state_dict())
    if not module.strict_loading:
        found = [difference for difference in found if difference.startswith("reshaped")]
    if not found:
        return
    listed = "\n  ".join(found)
    if strict:
        raise ModelMismatchError(
            f"{path} was written by another model:\n  {listed}\n"
            "Use another dirpath, or `strict=False` to load what fits."
        )
    warnings.warn(
        f"lightning-scar: {path} was written by another model; what fits is loaded, optimizer states are not:\n"
        f"  {listed}",
        stacklevel=2,
    )
    keep_what_fits(checkpoint, module.state_dict())
    module.strict_loading = False
