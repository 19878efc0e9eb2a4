"""Where a loop is, and how it goes on from there."""

import sys
from typing import Any

from lightning_scar.core.compatibility import ModelMismatchError, check_fit, check_ranks_agree
from lightning_scar.core.random_generators import random_generators, set_random_generators
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.resumption import check_not_all_damaged, newest_heads
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.training_state import TrainingState
from lightning_scar.loops.framework import Framework


class LoopState:
    """What a loop consists of, and how far it has come.

    Args:
        framework: What it is written with.
        dirpath: Its running checkpoint, for errors.
        strict: Whether a checkpoint of another model is an error.

    Attributes:
        framework: As given.
        parts: What it consists of, once :meth:`begin` has looked.
        ranks: Those that the data are shared out among, dead ones included.
        batches: How many are done, for each rank.
        steps: In how many of them an optimizer made a step.

    """

    def __init__(self, framework: Framework, dirpath: str, strict: bool) -> None:
        self.framework = framework
        self.parts = TrainingState()
        self.ranks = Ranks()
        self.batches = 0
        self.steps = 0
        self._dirpath = dirpath
        self._strict = strict
        self._place: dict[str, Any] = {}

    def begin(self) -> None:
        """Looks at what there is: what is made or thrown away later does not change what is saved.

        Raises:
            ValueError: If there is no model or no optimizer.

        """
        self.parts = self.framework.training_state()
        if not self.parts.modules or not self.parts.inner_optimizers:
            raise ValueError(
                f"there is no {'optimizer' if self.parts.modules else 'model'} to save; {self.framework.remedy}"
            )

    def note(self) -> None:
        """A step is counted: this is the place that belongs to the weights, until the next one."""
        self._place = self._present_place()

    def _present_place(self) -> dict[str, Any]:
        return {"batches": self.batches, "ranks": self.ranks.world_size, **self.framework.place()}

    def dump(self, behind: int = 0) -> dict[str, Any]:
        """The checkpoint dict behind the last step, with references to live tensors.

        Of batches whose gradients are still being added up it knows nothing: they are in no checkpoint.

        Args:
            behind: 1 if the batch that made the last step is not counted yet.

        """
        place = self._place
        if behind:
            self.framework.look_at_batch()
            place = {**self._present_place(), "batches": self.batches + 1}
        return {
            **self.parts.dump(),
            "global_step": self.steps + behind,
            "loop": place,
            "random": random_generators(),
        }

    def take(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """Goes on where a checkpoint dict is, but for random numbers."""
        self.take_step(checkpoint, strict)
        place, now = checkpoint["loop"], self.ranks.world_size
        self.steps = checkpoint["global_step"]
        self.batches = self.framework.take_place(place["batches"], place, before=place["ranks"], now=now)
        self.note()

    def take_step(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """Takes what a step changes from a checkpoint dict, and nothing else."""
        self.parts.load(checkpoint, self._dirpath, strict)

    def go_on(
        self,
        running: RunningCheckpoint,
        kept: dict[str, Any] | None,
        first_incarnation: int | None,
        weights_only: bool | None,
    ) -> None:
        """Goes on from what was kept in memory, or from what is on disk if that is newer. A collective.

        Args:
            running: The running checkpoint; saves continue what is restored from it.
            kept: From memory; ``None`` for nothing.
            first_incarnation: The first start whose saves on disk count; ``None`` if none do.
            weights_only: As in ``torch.load``.

        Raises:
            ModelMismatchError: If another model wrote it, or a Trainer, or the ranks' models differ.
            NoCheckpointError: If there is nothing left but damaged files.

        """
        check_ranks_agree(self.ranks, self.parts.state_dict())
        if first_incarnation is not None:
            self.ranks.together(lambda: check_not_all_damaged(running))
        # As the first rank sees it, since hosts differ in what they have in memory.
        heads = self.ranks.gather(newest_heads(running) if first_incarnation is not None else {})[0].values()
        newest = max((head.step for head in heads if head.incarnation >= (first_incarnation or 0)), default=-1)
        if kept is not None and kept["global_step"] >= newest:
            self.take(kept)
        elif newest >= 0:
            self._restore(running, weights_only)

    def _restore(self, running: RunningCheckpoint, weights_only: bool | None) -> None:
        live = self.parts.state_dict()
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
