"""The state that a worker leaves in memory-backed storage when all workers are to be started again.

A failure in a validation, a barrier or a checkpoint cannot be mended in the process. Nothing but start-up time is lost
all the same: one survivor writes its exact state, and every worker of the next start loads it.
"""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn

from lightning_scar import _lightning, joining
from lightning_scar.core.exchange import receive, send

#: Where a checkpoint dict holds what else the next start needs.
_KEY = "lightning_scar"


class Calls:
    """The calls of a Trainer's ``fit``, ``test`` and so on in this process, numbered: a script makes the same again."""

    def __init__(self) -> None:
        self.number = 0
        self._last_fit: tuple[int, pl.Trainer] | None = None

    def begin(self, trainer: pl.Trainer, writes: bool) -> None:
        """A call begins.

        Args:
            trainer: Whose.
            writes: Whether this worker keeps the state of an earlier ``fit`` when another one begins.

        """
        self.number += 1
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if self._last_fit is not None and writes:
            number, last = self._last_fit
            keep(last, number, finished=True)
        self._last_fit = self.number, trainer

    @property
    def is_first_fit(self) -> bool:
        """Whether a replacement that runs the script from its beginning would come to the present call first."""
        return self.number == 1

    def keep_last_fit(self) -> None:
        """Writes the state of the ``fit`` under way, or else of the last one."""
        if self._last_fit is not None:
            number, trainer = self._last_fit
            keep(trainer, number, finished=number != self.number or not (trainer.training or trainer.validating))

    def share_kept(self) -> None:
        """Lets all nodes see the state that the present call begins with. A collective."""
        share(self.number)

    def kept(self) -> str | None:
        """The state that the present call begins with, if an earlier start left one."""
        path = _path(self.number)
        return str(path) if path.exists() else None


#: Those of this process.
calls = Calls()


def share(call: int) -> None:
    """Brings the state that was kept for a call to the nodes that do not see it. A collective.

    Args:
        call: The number of the call.

    """
    path = _path(call)
    kept: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(kept, path.exists())
    if all(kept) or not any(kept):
        return
    source, missing = kept.index(True), [rank for rank, here in enumerate(kept) if not here]
    if dist.get_rank() == source:
        send(torch.load(path, weights_only=False), missing)
    elif dist.get_rank() in missing:
        _write(receive(source), path)
    dist.barrier()


def keep(trainer: pl.Trainer, call: int, finished: bool) -> None:
    """Writes a trainer's state, whole or not at all.

    Args:
        trainer: In, or behind, its ``fit``.
        call: The number of that call.
        finished: Whether the training is over.

    """
    checkpoint = _lightning.dump_checkpoint(trainer)
    joining.undo_unfinished_step(checkpoint, trainer.accumulate_grad_batches)
    is_sharded = joining.has_sharded_optimizer(trainer)
    if is_sharded:
        # Each rank has its own part; it is in the running checkpoint.
        checkpoint.pop("optimizer_states")
    checkpoint[_KEY] = {"finished": finished, "is_sharded": is_sharded, "live": joining.live_state(trainer)}
    _write(checkpoint, _path(call))


def resume(trainer: pl.Trainer, path: str) -> None:
    """Makes the ``fit`` under way go on from a kept state.

    Args:
        trainer: Before it reads the checkpoint that was asked for.
        path: From :meth:`Calls.kept`.

    """

    def loaded(path: str, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint.pop(_KEY)
        trainer.should_stop = kept["finished"] or kept["live"]["should_stop"]
        if kept["is_sharded"]:
            checkpoint["optimizer_states"] = joining.successors(trainer)[0].optimizer_states()

    # This program wrote it itself.
    _lightning.intercept_resume(trainer, lambda asked_for: path, loaded, weights_only=False)


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    # Several workers of a node may write the same.
    partial = path.with_suffix(f".{os.getpid()}.partial")
    torch.save(checkpoint, partial)
    partial.replace(path)


def _path(call: int) -> Path:
    return Path(os.environ["LIGHTNING_SCAR_STATE"]) / f"call-{call:04d}.ckpt"
