"""What a run resumes from, and whether it fits."""

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_scar.core.compatibility import ModelMismatchError, differences, keep_what_fits
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.restoration import NoCheckpointError
from lightning_scar.storage.store import DeltaStore


def newest_step(dirpath: str, storage_options: dict[str, Any] | None) -> int:
    """The step of the newest save in a directory; -1 if it holds none."""
    store = DeltaStore(dirpath, storage_options)
    store.refresh()
    return max((head.step for head in store.index.heads.values()), default=-1)


def unfinished_run(dirpath: str, storage_options: dict[str, Any] | None) -> str | None:
    """The directory, if it holds a run that was cut short; ``None`` if it holds none.

    Raises:
        MisconfigurationException: If the run is finished: going on from it must be asked for.
        NoCheckpointError: If there is nothing left but damaged files: beginning anew must be asked for.

    """
    store = DeltaStore(dirpath, storage_options)
    store.refresh()
    heads = store.index.heads
    if not heads and store.damaged:
        damage = "\n  ".join(map(str, store.damaged[:8]))
        raise NoCheckpointError(
            f"{dirpath} holds nothing but damaged files:\n  {damage}\n"
            "To begin anew, choose another dirpath, or set `resume=False`, which replaces them."
        )
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


def check_ranks_agree(ranks: Ranks, module: pl.LightningModule) -> None:
    """Makes sure that all ranks have the same model. A collective.

    Args:
        ranks: The ranks.
        module: This rank's model.

    Raises:
        ModelMismatchError: If they differ; the first tensor that does is named.

    """
    if ranks.world_size == 1:
        return
    own = {name: (tuple(t.shape), t.dtype) for name, t in module.state_dict().items() if isinstance(t, Tensor)}
    first, *others = ranks.gather(own)
    for rank, other in enumerate(others, start=1):
        for name in [*first, *other]:
            if first.get(name) != other.get(name):
                raise ModelMismatchError(
                    f"the ranks disagree on the model: {name} is {_said(first.get(name))} on rank 0 and "
                    f"{_said(other.get(name))} on rank {rank}. Build the same model on all ranks."
                )
        if list(first) != list(other):
            name = next(a for a, b in zip(first, other, strict=True) if a != b)
            raise ModelMismatchError(
                f"the ranks disagree on the order of the model's tensors, from {name} on (rank 0 and rank {rank}). "
                "Build the same model on all ranks."
            )


def _said(tensor: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if tensor is None else f"{tensor[0]} {str(tensor[1]).removeprefix('torch.')}"
