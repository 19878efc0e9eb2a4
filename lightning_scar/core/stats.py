"""Counters of a run, for loggers and programs."""

from dataclasses import dataclass

from lightning_scar.core.notices import Notices
from lightning_scar.core.save import Save


@dataclass
class Stats:
    """The costs of a running checkpoint, and how far it is behind the live state.

    With several ranks, all values are those of this rank's share.

    Attributes:
        step: The optimizer step of the last save.
        saves: Saves that were handed to the writer.
        full_saves: How many of them were full.
        skipped_saves: Partial saves skipped because the writer was behind.
        failed_saves: Saves that could not be written.
        non_finite_blocks: Blocks of the last save that hold NaN or Inf and did not replace a good version.
        heals: How often non-finite blocks of the live run were restored.
        bytes_written: Bytes of all files written to storage, including merged ones.
        memory_bytes: Bytes that this rank holds in memory.
        unreplicated_saves: How many saves its copies on other hosts lag behind.
        stall_seconds: How long the training thread stood still for the last partial save, including the fence.
        full_stall_seconds: The same for the last full save.
        distance: L2 distance between the live state and the running checkpoint after the last save.
        rework_cost: The estimated steps that a crash right after the last save would cost; see
            :class:`~lightning_scar.core.rework.Motion`.
        oldest_age: Steps since the oldest block that has changed was written exactly.
        queue_depth: Deltas waiting to be written when the last save was handed over.

    """

    step: int = 0
    saves: int = 0
    full_saves: int = 0
    skipped_saves: int = 0
    failed_saves: int = 0
    non_finite_blocks: int = 0
    heals: int = 0
    bytes_written: int = 0
    memory_bytes: int = 0
    unreplicated_saves: int = 0
    stall_seconds: float = 0.0
    full_stall_seconds: float = 0.0
    distance: float = 0.0
    rework_cost: float = 0.0
    oldest_age: int = 0
    queue_depth: int = 0

    def note(self, save: Save) -> None:
        """Count a save."""
        self.saves += 1
        self.full_saves += save.full
        self.step = save.version.step
        self.non_finite_blocks = save.non_finite
        self.distance = save.distance
        self.rework_cost = save.motion.rework_cost
        self.oldest_age = save.oldest_age

    def warn_of_non_finite(self, notices: Notices) -> None:
        """Warn once of blocks that were not saved.

        Args:
            notices: Warns.

        """
        if self.non_finite_blocks:
            notices.warn(
                "non_finite",
                f"{self.non_finite_blocks} blocks hold NaN or Inf at step {self.step}; their last good versions "
                "stay in the running checkpoint (counted as non_finite_blocks)",
            )
