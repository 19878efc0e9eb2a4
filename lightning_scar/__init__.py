"""Failures made cheap for PyTorch training: priority partial checkpoints and partial recovery."""

from lightning_scar.callback import SCARCheckpoint
from lightning_scar.checkpoint_io import SCARCheckpointIO
from lightning_scar.core.restoration import load

__all__ = ["SCARCheckpoint", "SCARCheckpointIO", "load"]
