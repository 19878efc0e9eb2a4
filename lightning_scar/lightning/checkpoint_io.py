"""``SCARCheckpointIO``: running checkpoints for ``ckpt_path=`` and ``trainer.save_checkpoint``."""

import weakref
from typing import Any

import lightning
import lightning.pytorch as pl
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from typing_extensions import override

from lightning_scar.core.restoration import is_running_checkpoint, load
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings
from lightning_scar.storage.directory import Directory


class SCARCheckpointIO(CheckpointIO):
    """Loads running checkpoints as Lightning checkpoint dicts, and saves to them block by block.

    The path decides: a directory that holds a running checkpoint, or a new path without an extension, is one. Any
    other path, such as ``"last.ckpt"``, is passed to the wrapped IO.

    Args:
        checkpoint_io: The IO of plain checkpoint files; by default ``TorchCheckpointIO``.
        settings: Settings of the running checkpoints that no :class:`~lightning_scar.SCARCheckpoint` has opened.
        storage_options: Arguments of the file system of running checkpoints.

    Example::

        >>> import torch
        >>> io = SCARCheckpointIO()
        >>> io.save_checkpoint({"state_dict": {"weight": torch.ones(2)}, "global_step": 1}, "memory://io-example")
        >>> io.teardown()
        >>> io.load_checkpoint("memory://io-example")["state_dict"]
        {'weight': tensor([1., 1.])}

    """

    def __init__(
        self,
        checkpoint_io: CheckpointIO | None = None,
        settings: Settings | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self.checkpoint_io = checkpoint_io or TorchCheckpointIO()
        # An AsyncCheckpointIO() without a base expects the strategy to set it.
        if getattr(self.checkpoint_io, "checkpoint_io", self) is None:
            self.checkpoint_io.checkpoint_io = TorchCheckpointIO()  # type: ignore[attr-defined]
        self._settings = settings
        self._storage_options = storage_options
        self._attached: dict[str, RunningCheckpoint] = {}
        self._opened: dict[str, RunningCheckpoint] = {}
        # Fabric never calls teardown of a strategy.
        weakref.finalize(self, _close_all, self._opened)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a copy be an IO with the same options that has opened nothing."""
        return type(self), (self.checkpoint_io, self._settings, self._storage_options)

    def attach(self, running: RunningCheckpoint) -> None:
        """Use an open running checkpoint for saves to its directory. The caller will close it."""
        self._attached[running.store.directory.path] = running

    def detach(self, running: RunningCheckpoint) -> None:
        """Undo :meth:`attach`."""
        self._attached.pop(running.store.directory.path, None)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Save a checkpoint dict.

        Args:
            checkpoint: The dict, with references to live tensors. For a running checkpoint, its step is
                ``"global_step"`` or else ``"step"``.
            path: A directory for a running checkpoint, or a file.
            storage_options: For a file, an argument of the wrapped IO.

        Raises:
            ValueError: If all ranks save to that directory, so that a single rank cannot.

        """
        running = self._attached.get(self._key(path))
        if running is not None and running.ranks.world_size > 1:
            raise ValueError(
                f"all {running.ranks.world_size} ranks save to {path}, so a single rank cannot; use another path"
            )
        if running is None and not self._is_running(path):
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)
        else:
            (running or self._open(path)).save_now(checkpoint, _step(checkpoint))

    @override
    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint dict; arguments and errors are those of :func:`lightning_scar.load` and the wrapped IO."""
        key = self._key(path)
        if running := self._attached.get(key, self._opened.get(key)):
            running.flush()
        if is_running_checkpoint(path, self._storage_options):
            checkpoint = load(
                path, map_location=map_location, weights_only=weights_only, storage_options=self._storage_options
            )
            if "loop" in checkpoint:
                # With its own version in the dict, a Trainer loads the weights without a migration.
                checkpoint.setdefault("pytorch-lightning_version", lightning.__version__)
            return checkpoint
        options = {"map_location": map_location} if map_location is not None else {}
        # Lightning 2.5 does not have this argument.
        options |= {"weights_only": weights_only} if weights_only is not None else {}
        return self.checkpoint_io.load_checkpoint(path, **options)

    @override
    def remove_checkpoint(self, path: _PATH) -> None:
        """Remove a checkpoint file or a running checkpoint."""
        self.checkpoint_io.remove_checkpoint(path)

    @override
    def teardown(self) -> None:
        """Finish the saves to running checkpoints that this object opened; raise or warn about failed ones."""
        _close_all(self._opened)
        self.checkpoint_io.teardown()

    def _is_running(self, path: _PATH) -> bool:
        name = str(path).rstrip("/").rsplit("/", 1)[-1]
        return "." not in name or is_running_checkpoint(path, self._storage_options)

    def _open(self, path: _PATH) -> RunningCheckpoint:
        key = self._key(path)
        if key not in self._opened:
            self._opened[key] = RunningCheckpoint(path, self._settings, self._storage_options)
        return self._opened[key]

    def _key(self, path: _PATH) -> str:
        return Directory(path, self._storage_options).path


def _close_all(opened: dict[str, RunningCheckpoint]) -> None:
    while opened:
        opened.popitem()[1].close()


def _step(checkpoint: dict[str, Any]) -> int:
    """Return the step of a Trainer's checkpoint, or of a Fabric user's."""
    return int(checkpoint.get("global_step", checkpoint.get("step", 0)))


def installed_io(trainer: pl.Trainer, storage_options: dict[str, Any] | None = None) -> SCARCheckpointIO:
    """Return the trainer's :class:`SCARCheckpointIO`; if there is none, wrap the present IO."""
    present = trainer.strategy.checkpoint_io
    if not isinstance(present, SCARCheckpointIO):
        present = SCARCheckpointIO(present, storage_options=storage_options)
        trainer.strategy.checkpoint_io = present
    return present
