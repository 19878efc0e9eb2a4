"""Failures made cheap for PyTorch training: priority partial checkpoints and partial recovery."""

from typing import TYPE_CHECKING, Any

from lightning_scar.core.restoration import load

if TYPE_CHECKING:
    from lightning_scar.callback import SCARCheckpoint
    from lightning_scar.checkpoint_io import SCARCheckpointIO

__all__ = ["SCARCheckpoint", "SCARCheckpointIO", "load"]


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import; the command and plain PyTorch loops do without it.
    if name == "SCARCheckpoint":
        from lightning_scar.callback import SCARCheckpoint

        return SCARCheckpoint
    if name == "SCARCheckpointIO":
        from lightning_scar.checkpoint_io import SCARCheckpointIO

        return SCARCheckpointIO
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
