"""The state that a worker leaves in memory-backed storage when all workers are to be started again.

A failure in a validation, a barrier or a checkpoint cannot be mended in the process. Nothing but start-up time is lost
all the same: one survivor writes its exact state, and every worker of the next start loads it.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn

from lightning_scar import _lightning, joining
from lightning_scar.core.exchange import receive, send
from lightning_scar.elastic.memory_folder import VARIABLE, state_folder
from lightning_scar.step_start import random_state

#: Where a checkpoint dict holds what else the next start needs.
_KEY = "lightning_scar"


class Kept(NamedTuple):
    """A state that was kept.

    Attributes:
        path: Its file.
        step: How many optimizer steps it has completed.

    """

    path: Path
    step: int


class Calls:
    """The calls of a Trainer's ``fit``, ``test`` and so on in this process, numbered: a script makes the same again."""

    def __init__(self) -> None:
        self.number = 0
        #: What else came with the kept state that the present call resumed from; ``None`` if it did not.
        self.resumed: dict[str, Any] | None = None
        self._last_fit: tuple[int, pl.Trainer] | None = None

    def begin(self, trainer: pl.Trainer, writes: bool) -> None:
        """A call begins.

        Args:
            trainer: Whose.
            writes: Whether this worker keeps the state of an earlier ``fit`` when another one begins.

        """
        self.number += 1
        self.resumed = None
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if self._last_fit is not None and writes:
            number, last = self._last_fit
            more = {"outages": [], "random": random_state()}
            _write(_state(last, finished=True, more=more), number, last.global_step)
        self._last_fit = self.number, trainer

    @property
    def is_first_fit(self) -> bool:
        """Whether a replacement that runs the script from its beginning would come to the present call first."""
        return self.number == 1

    def keep(self, more: dict[str, Any]) -> None:
        """Writes the state of the ``fit`` under way, or else of the last one, whole or not at all.

        Args:
            more: What is to come with it, as :attr:`resumed`.

        """
        if self._last_fit is not None:
            number, trainer = self._last_fit
            finished = number != self.number or not (trainer.training or trainer.validating)
            _write(_state(trainer, finished, more), number, trainer.global_step)

    def kept(self) -> Kept | None:
        """The newest state that was kept for the present call, if there is one."""
        if VARIABLE not in os.environ:
            # Nobody supervises this process.
            return None
        paths = state_folder().glob(f"call-{self.number:04d}-*.ckpt")
        kept = [Kept(path, int(path.stem.split("-")[-1])) for path in paths]
        return max(kept, key=lambda kept: kept.step, default=None)

    def keep_random(self, slot: int, state: list[Any]) -> None:
        """Writes the state of a worker's own random generators, which is in no other one."""
        torch.save(state, state_folder() / f"random-{slot}.pt")

    def random(self, slot: int) -> list[Any]:
        """What this worker's random generators go on from; those of a dead one as the keeper's."""
        assert self.resumed is not None
        path = state_folder() / f"random-{slot}.pt"
        state: list[Any] = torch.load(path, weights_only=True) if path.exists() else self.resumed["random"]
        path.unlink(missing_ok=True)
        return state

    def share_kept(self) -> None:
        """Brings the kept state to the nodes that do not see it. A collective."""
        own = self.kept()
        steps: list[int] = [-1] * dist.get_world_size()
        dist.all_gather_object(steps, -1 if own is None else own.step)
        source = steps.index(max(steps))
        missing = [rank for rank, step in enumerate(steps) if step < steps[source]]
        if dist.get_rank() == source and missing and own is not None:
            send(torch.load(own.path, weights_only=False), missing)
        elif dist.get_rank() in missing:
            _write(receive(source), self.number, steps[source])
        dist.barrier()

    def resume(self, trainer: pl.Trainer, kept: Kept) -> None:
        """Makes the ``fit`` under way go on from a kept state.

        Args:
            trainer: Before it reads the checkpoint that was asked for.
            kept: The state.

        """

        def loaded(path: str, checkpoint: dict[str, Any]) -> None:
            self.resumed = checkpoint.pop(_KEY)
            trainer.should_stop = self.resumed["finished"] or self.resumed["live"]["should_stop"]
            if "optimizer_states" not in checkpoint:
                checkpoint["optimizer_states"] = joining.successors(trainer)[0].optimizer_states()

        # This program wrote it itself.
        _lightning.intercept_resume(trainer, lambda asked_for: str(kept.path), loaded, weights_only=False)


#: Those of this process.
calls = Calls()


def _state(trainer: pl.Trainer, finished: bool, more: dict[str, Any]) -> dict[str, Any]:
    checkpoint = _lightning.dump_checkpoint(trainer)
    joining.undo_unfinished_step(checkpoint, trainer.accumulate_grad_batches)
    if joining.has_sharded_optimizer(trainer):
        # Each rank has its own part; it is in the running checkpoint.
        checkpoint.pop("optimizer_states")
    checkpoint[_KEY] = {"finished": finished, "live": joining.live_state(trainer), **more}
    return checkpoint


def _write(checkpoint: dict[str, Any], call: int, step: int) -> None:
    path = state_folder() / f"call-{call:04d}-{step:09d}.ckpt"
    # Several workers of a node may write the same.
    partial = path.with_suffix(f".{os.getpid()}.partial")
    torch.save(checkpoint, partial)
    partial.replace(path)
    for older in state_folder().glob(f"call-{call:04d}-*.ckpt"):
        if older.name < path.name:
            older.unlink(missing_ok=True)
