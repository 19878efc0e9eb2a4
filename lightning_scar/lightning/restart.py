"""The calls of a Trainer in this process, and the state that is kept of each when all workers are started again."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_scar.continuation.restart_state import Kept, keep, newest_kept
from lightning_scar.continuation.snapshot import random_state
from lightning_scar.lightning import private, replacement

#: Where a checkpoint dict holds what else the next start needs.
_KEY = "lightning_scar"


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
            keep(_state(last, finished=True, more=more), number, last.global_step)
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
            keep(_state(trainer, finished, more), number, trainer.global_step)

    def kept(self) -> Kept | None:
        """The newest state that was kept for the present call, if there is one."""
        return newest_kept(self.number)

    def resume(self, trainer: pl.Trainer, kept: Kept) -> None:
        """Makes the ``fit`` under way go on from a kept state.

        Args:
            trainer: Before it reads the checkpoint that was asked for.
            kept: The state.

        """

        def choose(asked_for: Any, weights_only: bool | None) -> dict[str, Any]:
            # This program wrote it itself.
            checkpoint: dict[str, Any] = torch.load(kept.path, map_location="cpu", weights_only=False)
            self.resumed = resumed = checkpoint.pop(_KEY)
            trainer.should_stop = resumed["finished"] or resumed["live"]["should_stop"]
            if "optimizer_states" not in checkpoint:
                checkpoint["optimizer_states"] = replacement.scar_checkpoints(trainer)[0].optimizer_states(trainer)
            return checkpoint

        private.intercept_resume(trainer, choose)


#: Those of this process.
calls = Calls()


def _state(trainer: pl.Trainer, finished: bool, more: dict[str, Any]) -> dict[str, Any]:
    checkpoint = private.dump_checkpoint(trainer)
    private.undo_unfinished_step(checkpoint, trainer.accumulate_grad_batches)
    if replacement.has_sharded_optimizer(trainer):
        # Each rank has its own part; it is in the running checkpoint.
        checkpoint.pop("optimizer_states")
    checkpoint[_KEY] = {"finished": finished, "live": replacement.live_state(trainer), **more}
    return checkpoint
