"""The state that a worker leaves in memory-backed storage when all workers are to be started again.

A failure in a validation, a barrier or a checkpoint cannot be mended in the process. Nothing but start-up time is lost
all the same: one survivor writes its exact state, and every worker of the next start loads it.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_scar.core.exchange import receive, send
from lightning_scar.elastic.worker.state_folder import VARIABLE, state_folder


class Kept(NamedTuple):
    """A state that was kept.

    Attributes:
        path: Its file.
        step: How many optimizer steps it has completed.

    """

    path: Path
    step: int


def newest_kept(training: int) -> Kept | None:
    """The newest state that was kept of a training, if there is one.

    Args:
        training: Its number among those of the program, from 1.

    """
    if VARIABLE not in os.environ:
        # Nobody supervises this process.
        return None
    paths = state_folder().glob(f"call-{training:04d}-*.ckpt")
    kept = [Kept(path, int(path.stem.split("-")[-1])) for path in paths]
    return max(kept, key=lambda kept: kept.step, default=None)


def keep(checkpoint: dict[str, Any], training: int, step: int) -> None:
    """Writes a state, whole or not at all, in the place of older ones.

    Args:
        checkpoint: The state.
        training: The number of its training.
        step: How many optimizer steps it has completed.

    """
    path = state_folder() / f"call-{training:04d}-{step:09d}.ckpt"
    # Several workers of a node may write the same.
    partial = path.with_suffix(f".{os.getpid()}.partial")
    torch.save(checkpoint, partial)
    partial.replace(path)
    for older in state_folder().glob(f"call-{training:04d}-*.ckpt"):
        if older.name < path.name:
            older.unlink(missing_ok=True)


def share_kept(training: int) -> None:
    """Brings the newest kept state, and :func:`noted_start`, to the nodes that do not see them. A collective.

    A node that took the place of a lost one has neither.

    Args:
        training: The number of its training.

    """
    own = newest_kept(training)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (-1 if own is None else own.step, noted_start(training)))
    steps = [step for step, _ in told]
    starts = [start for _, start in told if start is not None]
    if starts and noted_start(training) is None:
        note_start(training, starts[0])
    source = steps.index(max(steps))
    missing = [rank for rank, step in enumerate(steps) if step < steps[source]]
    if dist.get_rank() == source and missing and own is not None:
        send(torch.load(own.path, weights_only=False), missing)
    elif dist.get_rank() in missing:
        keep(receive(source), training, steps[source])
    dist.barrier()


def keep_random(slot: int, state: list[Any]) -> None:
    """Writes the state of a worker's own random generators, which is in no other one."""
    torch.save(state, state_folder() / f"random-{slot}.pt")


def take_random(slot: int) -> list[Any] | None:
    """What a worker's random generators go on from, once; ``None`` if it died before it could say."""
    path = state_folder() / f"random-{slot}.pt"
    if not path.exists():
        return None
    state: list[Any] = torch.load(path, weights_only=True)
    path.unlink()
    return state


def note_start(training: int, incarnation: int) -> None:
    """Tells later starts of this job which saves on disk are its own.

    Args:
        training: The number of the training.
        incarnation: The number of its first start.

    """
    path = state_folder() / f"start-{training:04d}"
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(str(incarnation))
    partial.replace(path)


def noted_start(training: int) -> int | None:
    """What :func:`note_start` was told; ``None`` if nothing."""
    path = state_folder() / f"start-{training:04d}"
    return int(path.read_text()) if path.exists() else None
