"""Process groups: how they form, and how any thread ends what waits in them.

Of a peer that is lost in some of them nobody is told: those of NCCL, and of backends like it. What waits for it on a
device waits until the group is aborted, and has garbage then.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lightning_scar.elastic.worker import gloo

#: Let torch's watchdog note an error, which :func:`failure` returns, and do nothing else: neither end the process, nor
#: tell older and newer groups through their store, nor sleep for a minute before it ends.
_WATCHDOG = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1",
}

#: Names of gloo.
_OF_GLOO = ("gloo", "cpu:gloo")

#: Between two looks at a device: a small part of a step.
_POLL_SECONDS = 5e-5


def hang_timeout() -> timedelta | None:
    """Return how long the others wait for a worker that hangs, if the user chose it."""
    seconds = os.environ.get("LIGHTNING_SCAR_HANG_TIMEOUT")
    return timedelta(seconds=float(seconds)) if seconds else None


def is_silent(backend: str) -> bool:
    """Return whether a lost peer makes no error.

    Args:
        backend: What ``init_process_group`` gets, or the configuration of a group.

    Example::

        >>> is_silent("cpu:gloo,cuda:nccl"), is_silent("gloo")
        (True, False)

    """
    return "nccl" in backend.lower()


def are_silent() -> bool:
    """Return whether there is a default group, and a peer lost in it makes no error."""
    return dist.is_initialized() and is_silent(dist.get_backend_config())


def form(backend: str, stops: Callable[[], bool] = lambda: False, **options: Any) -> None:
    """Form the default process group, and prepare the environment for it, whatever that says.

    Args:
        backend: What ``init_process_group`` gets.
        stops: Whether a member is known to be lost.
        options: As for ``init_process_group``.

    """
    if is_silent(backend):
        os.environ.update(_WATCHDOG)
    if backend in _OF_GLOO:
        gloo.form(stops, **options)
    else:
        dist.init_process_group(backend=backend, **options)


def wait_for_device(stops: Callable[[], bool]) -> None:
    """Wait until the device has done what this thread has queued, or a condition holds.

    Not within CUDA: there a thread waits for a dead peer until the group is aborted, and for ever if nobody notices.

    Args:
        stops: The condition.

    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    done = torch.Event("cuda")
    done.record()
    while not (done.query() or stops()):
        time.sleep(_POLL_SECONDS)


def failure() -> str:
    """Return what torch's watchdog has noted of a group, such as a timeout; "" if it has noted nothing."""
    for group in _all():
        get_error = getattr(_on_device(group), "get_error", None)
        if get_error is not None and (error := get_error().name) != "SUCCESS":
            return f"the watchdog of the process group has noted {error}"
    return ""


def abort_all() -> None:
    """Abort all groups, from any thread: wake what waits for a lost peer."""
    groups = [_on_device(group) for group in reversed(_all())]
    with _as_one(groups):
        for group in groups:
            # Another thread may have been first.
            with suppress(RuntimeError):
                group.abort()


def leave_all() -> None:
    """Abort all groups, and forget them."""
    abort_all()
    if not are_silent():
        dist.destroy_process_group()
        return
    try:
        dist.distributed_c10d._abort_process_group()
    except RuntimeError:
        dist.destroy_process_group()


@contextmanager
def _as_one(groups: list[Any]) -> Iterator[None]:
    """Let NCCL end several communicators at once, because the end of one might wait for another."""
    begins = [group for group in groups if hasattr(group, "_group_start")][:1]
    for group in begins:
        group._group_start()
    yield
    for group in begins:
        group._group_end()


def _all() -> list[Any]:
    return list(dist.distributed_c10d._world.pg_map)


def _on_device(group: Any) -> Any:
    """Return what runs a group's collectives on a device; the group itself if that is written in Python."""
    try:
        return group._get_backend(torch.device("cuda"))
    except RuntimeError:
        return group
