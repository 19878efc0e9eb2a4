"""Failures made cheap for PyTorch training: priority partial checkpoints and partial recovery."""

import importlib
from typing import TYPE_CHECKING, Any

from lightning_scar.core.restoration import load

if TYPE_CHECKING:
    from lightning_scar.callback import SCARCheckpoint
    from lightning_scar.checkpoint_io import SCARCheckpointIO
    from lightning_scar.strategy import SCARDDPStrategy

__all__ = ["SCARCheckpoint", "SCARCheckpointIO", "SCARDDPStrategy", "load"]

#: Where the names are that need Lightning.
_FRONT_DOORS = {
    "SCARCheckpoint": "lightning_scar.callback",
    "SCARCheckpointIO": "lightning_scar.checkpoint_io",
    "SCARDDPStrategy": "lightning_scar.strategy",
}


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import; the command and plain PyTorch loops do without it.
    if name not in _FRONT_DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # For any of them: this is what makes `Trainer(strategy="scar_ddp")` known.
    importlib.import_module(_FRONT_DOORS["SCARDDPStrategy"])
    return getattr(importlib.import_module(_FRONT_DOORS[name]), name)
