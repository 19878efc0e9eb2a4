"""Failures made cheap for PyTorch training: priority partial checkpoints and partial recovery."""

import importlib
from typing import TYPE_CHECKING, Any

from lightning_scar.lightning.registration import register as _register

if TYPE_CHECKING:
    from lightning_scar.core.restoration import load
    from lightning_scar.lightning.checkpoint import SCARCheckpoint
    from lightning_scar.lightning.checkpoint_io import SCARCheckpointIO
    from lightning_scar.lightning.strategy import SCARDDPStrategy
    from lightning_scar.loops.accelerate import SCARAccelerator
    from lightning_scar.loops.continuation import SCARContinuation
    from lightning_scar.loops.loop import SCARLoop

__all__ = [
    "SCARAccelerator",
    "SCARCheckpoint",
    "SCARCheckpointIO",
    "SCARContinuation",
    "SCARDDPStrategy",
    "SCARLoop",
    "load",
]

#: Where the names are. Torch, Lightning and Accelerate take seconds to import: who does not name them does without.
_MODULES = {
    "SCARCheckpoint": "lightning_scar.lightning.checkpoint",
    "SCARCheckpointIO": "lightning_scar.lightning.checkpoint_io",
    "SCARDDPStrategy": "lightning_scar.lightning.strategy",
    "SCARAccelerator": "lightning_scar.loops.accelerate",
    "SCARContinuation": "lightning_scar.loops.continuation",
    "SCARLoop": "lightning_scar.loops.loop",
    "load": "lightning_scar.core.restoration",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]


_register()
