"""The calls of a Trainer in this process, and the state of each for a restart of all workers."""

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_scar.continuation.restart_state import (
    RestartState,
    newest_restart_state,
    pop_own_state,
    save_restart_state,
)
from lightning_scar.continuation.step_generators import StepGenerators
from lightning_scar.lightning import moment, private, replacement
from lightning_scar.lightning.moment import Moment
from lightning_scar.lightning.private_loops import use_own_loader_states
from lightning_scar.lightning.progress import KEY


class TrainerCalls:
    """The numbered calls of ``fit``, ``test`` etc. in this process; a restarted script makes the same calls."""

    def __init__(self) -> None:
        self.number = 0
        #: What was written with the restart state that the current call resumed from; ``None`` if it did not.
        self.resumed: dict[str, Any] | None = None
        #: The moment of that restart state.
        self.moment: Moment | None = None
        self._last_fit: tuple[int, pl.Trainer] | None = None

    def start_call(self, trainer: pl.Trainer, writes: bool) -> None:
        """Count a call. When another ``fit`` starts, write the state of the one before it.

        Args:
            trainer: The trainer.
            writes: Whether this worker writes that state.

        """
        self.number += 1
        self.resumed = self.moment = None
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if self._last_fit is not None and writes:
            number, last = self._last_fit
            more: dict[str, Any] = {"outages": []}
            _keep_finished(last, number, more)
        self._last_fit = self.number, trainer

    @property
    def is_first_fit(self) -> bool:
        """Whether this is the first call of the script, and so the one that a replacement reaches."""
        return self.number == 1

    def save_restart_state(self, more: dict[str, Any]) -> None:
        """Write the state of the current ``fit``, or else of the last one, atomically.

        Args:
            more: What to write with it, for :attr:`resumed`.

        """
        if self._last_fit is not None:
            number, trainer = self._last_fit
            if number == self.number and trainer.sanity_checking:
                return  # It has trained nothing yet.
            finished = number != self.number or not (trainer.training or trainer.validating)
            save_restart_state(_state(trainer, finished, more), number, trainer.global_step)

    def own_state(self) -> dict[str, Any]:
        """Return what no other worker has of the state of the current ``fit``."""
        if self._last_fit is None or self._last_fit[0] != self.number:
            return {}
        checkpoint = moment.dump(self._last_fit[1])
        return {name: checkpoint[name] for name in ("global_step", "loops", KEY)}

    def restart_state(self) -> RestartState | None:
        """Return the newest restart state of the current call, if there is one."""
        return newest_restart_state(self.number)

    def resume(self, trainer: pl.Trainer, restart_state: RestartState) -> None:
        """Make the current ``fit`` resume from a restart state.

        Args:
            trainer: The trainer, before it reads ``ckpt_path``.
            restart_state: The state.

        """

        def choose(asked_for: Any, weights_only: bool | None) -> dict[str, Any]:
            # Safe, because this program wrote the file itself.
            checkpoint: dict[str, Any] = torch.load(restart_state.path, map_location="cpu", weights_only=False)
            self.resumed = resumed = checkpoint[KEY]
            slot, step = trainer.global_rank, checkpoint["global_step"]
            own = pop_own_state(slot, step)
            if not own:
                # One that was killed, or a step behind, goes on with the other's.
                own = checkpoint
                own[KEY]["random"] = {**own[KEY]["random"], **StepGenerators(slot).plain(step)}
            use_own_loader_states(checkpoint, own)
            self.moment = Moment(trainer, checkpoint, own)
            trainer.should_stop = resumed["finished"] or resumed["live"]["should_stop"]
            if "optimizer_states" not in checkpoint:
                checkpoint["optimizer_states"] = replacement.scar_checkpoints(trainer)[0].optimizer_states(trainer)
            return checkpoint

        private.intercept_resume(trainer, choose)


#: The calls of this process.
trainer_calls = TrainerCalls()


def _keep_finished(trainer: pl.Trainer, number: int, more: dict[str, Any]) -> None:
    try:
        save_restart_state(_state(trainer, finished=True, more=more), number, trainer.global_step, is_finished=True)
    except OSError as error:
        warnings.warn(f"lightning-scar: {error}; a start of all workers would make this fit again", stacklevel=2)


def _state(trainer: pl.Trainer, finished: bool, more: dict[str, Any]) -> dict[str, Any]:
    checkpoint = moment.dump(trainer)
    if replacement.has_sharded_optimizer(trainer):
        # Each rank has its own shard, which is in the running checkpoint.
        checkpoint.pop("optimizer_states")
    checkpoint[KEY] |= {"finished": finished, "live": replacement.live_state(trainer, checkpoint), **more}
    return checkpoint
