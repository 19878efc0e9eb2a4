"""The state that a worker writes to memory-backed storage before all workers are restarted.

A failure in a validation, a barrier or a checkpoint requires new processes. Still, only start-up time is lost: one
survivor writes its exact state, and every worker loads it after the restart.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_scar.core.exchange import receive, send
from lightning_scar.elastic.worker.state_folder import VARIABLE, state_folder


class RestartState(NamedTuple):
    """A state that was written for a restart.

    Attributes:
        path: Its file.
        step: The number of completed optimizer steps.

    """

    path: Path
    step: int


def newest_restart_state(training: int) -> RestartState | None:
    """Return the newest restart state of a training, if there is one.

    Args:
        training: The training's number in the program, from 1.

    """
    if VARIABLE not in os.environ:
        # There is no supervisor.
        return None
    paths = state_folder().glob(f"call-{training:04d}-*.ckpt")
    states = [RestartState(path, int(path.stem.split("-")[-1])) for path in paths]
    return max(states, key=lambda state: state.step, default=None)


def save_restart_state(checkpoint: dict[str, Any], training: int, step: int) -> None:
    """Write a state atomically, and remove older ones.

    Args:
        checkpoint: The state.
        training: The training's number.
        step: The number of completed optimizer steps.

    """
    path = state_folder() / f"call-{training:04d}-{step:09d}.ckpt"
    # Several workers of a node may write the same file.
    partial = path.with_suffix(f".{os.getpid()}.partial")
    torch.save(checkpoint, partial)
    partial.replace(path)
    for older in state_folder().glob(f"call-{training:04d}-*.ckpt"):
        if older.name < path.name:
            older.unlink(missing_ok=True)


def share_restart_state(training: int) -> None:
    """Send the newest restart state, and :func:`noted_incarnation`, to nodes without them. A collective.

    A node that replaces a lost one has neither.

    Args:
        training: The training's number.

    """
    own = newest_restart_state(training)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (-1 if own is None else own.step, noted_incarnation(training)))
    steps = [step for step, _ in gathered]
    starts = [start for _, start in gathered if start is not None]
    if starts and noted_incarnation(training) is None:
        note_incarnation(training, starts[0])
    source = steps.index(max(steps))
    missing = [rank for rank, step in enumerate(steps) if step < steps[source]]
    if dist.get_rank() == source and missing and own is not None:
        send(torch.load(own.path, weights_only=False), missing)
    elif dist.get_rank() in missing:
        save_restart_state(receive(source), training, steps[source])
    dist.barrier()


def save_random_state(slot: int, state: list[Any]) -> None:
    """Write the state of this worker's random generators, which no other worker has."""
    torch.save(state, state_folder() / f"random-{slot}.pt")


def pop_random_state(slot: int) -> list[Any] | None:
    """Return the saved state of a worker's random generators, and remove it; ``None`` if there is none."""
    path = state_folder() / f"random-{slot}.pt"
    if not path.exists():
        return None
    state: list[Any] = torch.load(path, weights_only=True)
    path.unlink()
    return state


def note_incarnation(training: int, incarnation: int) -> None:
    """Record which saves on disk belong to this job, for later restarts.

    Args:
        training: The training's number.
        incarnation: The incarnation of its first start.

    """
    path = state_folder() / f"start-{training:04d}"
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(str(incarnation))
    partial.replace(path)


def noted_incarnation(training: int) -> int | None:
    """Return the incarnation that :func:`note_incarnation` recorded; ``None`` if none."""
    path = state_folder() / f"start-{training:04d}"
    return int(path.read_text()) if path.exists() else None
