"""Failures made cheap for PyTorch training: priority partial checkpoints and partial recovery."""

import importlib
from typing import TYPE_CHECKING, Any

from lightning_scar.core.restoration import load

if TYPE_CHECKING:
    from lightning_scar.accelerate import SCARAccelerator
    from lightning_scar.callback import SCARCheckpoint
    from lightning_scar.checkpoint_io import SCARCheckpointIO
    from lightning_scar.loop import SCARLoop
    from lightning_scar.loop_continuation import SCARContinuation
    from lightning_scar.strategy import SCARDDPStrategy

__all__ = [
    "SCARAccelerator",
    "SCARCheckpoint",
    "SCARCheckpointIO",
    "SCARContinuation",
    "SCARDDPStrategy",
    "SCARLoop",
    "load",
]

#: Where the names are that need Lightning.
_OF_LIGHTNING = {
    "SCARCheckpoint": "lightning_scar.callback",
    "SCARCheckpointIO": "lightning_scar.checkpoint_io",
    "SCARDDPStrategy": "lightning_scar.strategy",
}
#: Where those are that do not.
_OF_LOOPS = {
    "SCARAccelerator": "lightning_scar.accelerate",
    "SCARContinuation": "lightning_scar.loop_continuation",
    "SCARLoop": "lightning_scar.loop",
}


def __getattr__(name: str) -> Any:
    # Lightning and Accelerate take seconds to import; the command and plain PyTorch loops do without them.
    if name in _OF_LIGHTNING:
        # For any of them: this is what makes `Trainer(strategy="scar_ddp")` known.
        importlib.import_module(_OF_LIGHTNING["SCARDDPStrategy"])
        return getattr(importlib.import_module(_OF_LIGHTNING[name]), name)
    if name in _OF_LOOPS:
        return getattr(importlib.import_module(_OF_LOOPS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
