"""The state of a loop and its position in the data, and how both are resumed."""

import sys
from collections.abc import Callable
from typing import Any

from lightning_scar.core.compatibility import ModelMismatchError, check_ranks_agree
from lightning_scar.core.optimizer_loading import NO_OWNERS, Owners, owners_of_states
from lightning_scar.core.random_generators import kept_generators, random_generators, set_random_generators
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.resumption import check_not_all_damaged, newest_heads
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.training_state import TrainingState
from lightning_scar.loops.data import LoopData
from lightning_scar.loops.framework import Framework


class LoopState:
    """The parts of a loop, and its progress.

    Args:
        framework: The loop's framework.
        dirpath: The running checkpoint's directory, for errors.
        strict: Whether a checkpoint of another model is an error.

    Attributes:
        framework: The loop's framework.
        parts: The models, optimizers and other parts, after :meth:`collect_parts`.
        batches: The number of batches that each rank has done.
        steps: The number of batches with an optimizer step.
        data: The place in the training data.

    """

    def __init__(self, framework: Framework, dirpath: str, strict: bool) -> None:
        self.framework = framework
        self.parts = TrainingState()
        self.batches = 0
        self.steps = 0
        self._dirpath = dirpath
        self._strict = strict
        self.data = LoopData(framework)
        self._position: dict[str, Any] = {}
        self._ahead: Callable[[], dict[str, Any]] | None = None
        self._random: Callable[[], dict[str, Any]] = random_generators

    @property
    def ranks(self) -> Ranks:
        """The ranks that the data are divided among, including dead ones."""
        return self.data.ranks

    def collect_parts(self) -> None:
        """Determine what is saved: objects that are created or deleted later do not change it.

        Raises:
            ValueError: If there is no model or no optimizer.

        """
        self.parts = self.framework.training_state()
        if not self.parts.modules or not self.parts.inner_optimizers:
            raise ValueError(
                f"there is no {'optimizer' if self.parts.modules else 'model'} to save; {self.framework.remedy}"
            )

    def count_batch(self) -> None:
        """Count a batch."""
        self.framework.record_batch()
        self.data.count()
        self.batches += 1

    def record_position(self) -> None:
        """Record the data position and the random numbers after a step, which belong to the present weights."""
        self._position, self._random = self._present_position(), kept_generators()
        self._ahead = self.data.loaded_ahead()

    def _present_position(self, uncounted: int = 0) -> dict[str, Any]:
        return {
            "batches": self.batches + uncounted,
            "ranks": self.ranks.world_size,
            "data": self.data.state(uncounted),
            **self.framework.accumulated(),
        }

    def dump(self, uncounted: int = 0) -> dict[str, Any]:
        """Return the checkpoint dict after the last step, with references to live tensors.

        It ignores batches whose gradients are still being accumulated, because no checkpoint holds gradients.

        Args:
            uncounted: 1 if the batch that made the last step is not counted yet.

        """
        position, random = self._position, self._random
        if uncounted:
            self.framework.record_batch()
            position, random = self._present_position(uncounted), random_generators
        elif self._ahead is not None:
            position = {**position, "data": {**position["data"], "ahead": self._ahead()}}
        return {
            **self.parts.dump(),
            "global_step": self.steps + uncounted,
            "loop": position,
            "random": random(),
        }

    def load(self, checkpoint: dict[str, Any], strict: bool = True, owners: Owners = NO_OWNERS) -> None:
        """Load a checkpoint dict and its data position, but not its random state."""
        self.load_step(checkpoint, strict, owners)
        position, now = checkpoint["loop"], self.ranks.world_size
        self.steps = checkpoint["global_step"]
        self.batches = position["batches"] * position["ranks"] // now
        self.framework.restore_accumulated(position)
        self.data.load(position["data"], position["ranks"])
        self.record_position()

    def load_step(self, checkpoint: dict[str, Any], strict: bool = True, owners: Owners = NO_OWNERS) -> None:
        """Load only what a step changes from a checkpoint dict."""
        self.parts.load(checkpoint, self._dirpath, strict, owners)

    def resume(
        self,
        running: RunningCheckpoint,
        restart_state: dict[str, Any] | None,
        first_incarnation: int | None,
        weights_only: bool | None,
    ) -> bool:
        """Resume from a restart state in memory, or from disk if that is newer. A collective.

        Args:
            running: The running checkpoint.
            restart_state: The state in memory, if there is one.
            first_incarnation: The first incarnation whose saves on disk count; ``None`` to ignore all.
            weights_only: As in ``torch.load``.

        Returns:
            Whether the run on disk is finished.

        Raises:
            ModelMismatchError: If another model wrote it, or a Trainer, or the ranks' models differ.
            NoCheckpointError: If only damaged files are left.

        """
        check_ranks_agree(self.ranks, self.parts.state_dict())
        running.read_back.expect(weights_only)
        if first_incarnation is not None:
            self.ranks.together(lambda: check_not_all_damaged(running))
        # The first rank decides, because the hosts have different files in memory.
        heads = self.ranks.gather(newest_heads(running) if first_incarnation is not None else {})[0].values()
        heads = [head for head in heads if head.incarnation >= (first_incarnation or 0)]
        newest = max((head.step for head in heads), default=-1)
        if restart_state is not None and restart_state["global_step"] >= newest:
            self.load(restart_state)
            return False
        is_finished = bool(heads) and all(head.info.get("finished") for head in heads)
        if heads:
            self._restore(running, weights_only, is_finished)
        return is_finished

    def _restore(self, running: RunningCheckpoint, weights_only: bool | None, is_finished: bool) -> None:
        restored = running.restore(weights_only, initial={"state_dict": self.parts.state_dict()})
        checkpoint = restored.checkpoint
        if "loop" not in checkpoint:
            raise ModelMismatchError(
                f"{self._dirpath} was written by a Trainer, so a loop cannot resume from it. Use another dirpath. To "
                f"start from its weights, `model.load_state_dict(lightning_scar.load({self._dirpath!r})['state_dict'])`"
            )
        is_own = restored.own is not None and restored.world_size == self.ranks.world_size
        if is_own:
            # Each rank draws its data with generators of its own.
            checkpoint["loop"] = restored.own["loop"]
        self.load(checkpoint, self._strict, owners_of_states(restored.map))
        if is_own:
            set_random_generators(restored.own["random"])
            self.record_position()
        if self.ranks.rank == 0:
            path = self._dirpath
            found = f"{path} holds a finished run" if is_finished else f"resuming from the running checkpoint {path}"
            print(f"lightning-scar: {found}: step {self.steps}, {running.recovery}", file=sys.stderr, flush=True)
