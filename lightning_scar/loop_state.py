"""Where a loop is, and how it goes on from there."""

import sys
from typing import Any

from lightning_scar.core.compatibility import ModelMismatchError, check_fit
from lightning_scar.core.random_generators import random_generators, set_random_generators
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.framework import Framework


class LoopState:
    """What a loop consists of, and how far it has come.

    Args:
        framework: What it is written with.
        dirpath: Its running checkpoint, for errors.
        strict: Whether a checkpoint of another model is an error.

    Attributes:
        framework: As given.
        ranks: Those that the data are shared out among, dead ones included.
        batches: How many are done, for each rank.
        steps: In how many of them an optimizer made a step.

    """

    def __init__(self, framework: Framework, dirpath: str, strict: bool) -> None:
        self.framework = framework
        self.ranks = Ranks()
        self.batches = 0
        self.steps = 0
        self._dirpath = dirpath
        self._strict = strict

    def dump(self, behind: int = 0) -> dict[str, Any]:
        """The checkpoint dict, with references to live tensors.

        Args:
            behind: How many batches, of a step each, are done but not counted yet.

        """
        if behind:
            self.framework.look_at_batch()
        return {
            **self.framework.training_state().dump(),
            "global_step": self.steps + behind,
            "loop": {"batches": self.batches + behind, "ranks": self.ranks.world_size, **self.framework.place()},
            "random": random_generators(),
        }

    def take(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """Goes on where a checkpoint dict is, but for random numbers."""
        self.take_step(checkpoint, strict)
        place, now = checkpoint["loop"], self.ranks.world_size
        self.steps = checkpoint["global_step"]
        self.batches = self.framework.take_place(place["batches"], place, before=place["ranks"], now=now)

    def take_step(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """Takes what a step changes from a checkpoint dict, and nothing else."""
        self.framework.training_state().load(checkpoint, self._dirpath, strict)

    def restore(self, running: RunningCheckpoint, weights_only: bool | None) -> None:
        """Goes on where a running checkpoint is, and says so. A collective.

        Args:
            running: The running checkpoint; saves continue it.
            weights_only: As in ``torch.load``.

        Raises:
            ModelMismatchError: If another model wrote it, or a Trainer.

        """
        live = self.framework.training_state().state_dict()
        restored = running.restore(weights_only, initial={"state_dict": live})
        checkpoint = restored.checkpoint
        if "loop" not in checkpoint:
            raise ModelMismatchError(
                f"{self._dirpath} was written by a Trainer, so it has no place in a loop. Use another dirpath. To "
                f"start from its weights, `model.load_state_dict(lightning_scar.load({self._dirpath!r})['state_dict'])`"
            )
        fits = check_fit(self._dirpath, checkpoint, live, self._strict)
        self.take(checkpoint, strict=self._strict and fits)
        if restored.own is not None and restored.world_size == self.ranks.world_size:
            set_random_generators(restored.own["random"])
        if self.ranks.rank == 0:
            said = f"resuming from the running checkpoint {self._dirpath}: step {self.steps}, {running.recovery}"
            print(f"lightning-scar: {said}", file=sys.stderr, flush=True)
