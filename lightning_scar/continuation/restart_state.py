"""The state that a worker writes to memory before all workers are restarted.

A failure in a validation, a barrier or a checkpoint requires new processes. Still, only start-up time is lost: one
survivor writes its exact state, and every worker loads it after the restart.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_scar.core.exchange import receive, send
from lightning_scar.elastic.worker.state_folder import find, find_all, write


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
    states = [RestartState(path, int(path.stem.split("-")[-1])) for path in find_all(_pattern(training))]
    return max(states, key=lambda state: state.step, default=None)


def save_restart_state(checkpoint: dict[str, Any], training: int, step: int, is_finished: bool = False) -> None:
    """Write a state atomically, and remove older ones.

    Args:
        checkpoint: The state.
        training: The training's number.
        step: The number of completed optimizer steps.
        is_finished: Whether the training is finished. The rest of the program may take long, so it goes to disk.

    Raises:
        OSError: If there is no room for it.

    """
    name = f"call-{training:04d}-{step:09d}.ckpt"
    write(name, lambda file: torch.save(checkpoint, file), to_disk=is_finished)
    for older in find_all(_pattern(training)):
        if older.name < name:
            older.unlink(missing_ok=True)


def drop_restart_state(training: int) -> None:
    """Remove the restart states of a training that need not be made again.

    Args:
        training: The training's number.

    """
    for path in find_all(_pattern(training)):
        path.unlink(missing_ok=True)


def _pattern(training: int) -> str:
    return f"call-{training:04d}-*.ckpt"


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


def save_own_state(slot: int, state: dict[str, Any]) -> None:
    """Write what no other worker has of this one's state, such as its random generators."""
    write(f"own-{slot}.pt", lambda file: torch.save(state, file))


def pop_own_state(slot: int, step: int) -> dict[str, Any]:
    """Return what a worker has saved by :func:`save_own_state`, and remove it.

    Args:
        slot: The worker's.
        step: The number of completed steps; nothing is returned if the worker saved it at another, or was killed.

    """
    path = find(f"own-{slot}.pt")
    if path is None:
        return {}
    # Safe, because this program wrote the file itself.
    state: dict[str, Any] = torch.load(path, weights_only=False)
    path.unlink()
    return state if state.get("global_step") == step else {}


def note_incarnation(training: int, incarnation: int) -> None:
    """Record which saves on disk belong to this job, for later restarts.

    Args:
        training: The training's number.
        incarnation: The incarnation of its first start.

    """
    write(f"start-{training:04d}", lambda file: file.write(str(incarnation).encode()))


def noted_incarnation(training: int) -> int | None:
    """Return the incarnation that :func:`note_incarnation` recorded; ``None`` if none."""
    path = find(f"start-{training:04d}")
    return int(path.read_text()) if path is not None else None
