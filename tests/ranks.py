"""Runs a function on several real processes that form a group over gloo on the loopback."""

import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from prepared import multiprocessing_context

#: How long the others may go on when one rank has failed, in seconds.
GRACE = 5.0


class Failure(NamedTuple):
    """How a rank ended that returned nothing."""

    type: str
    message: str
    traceback: str
    when: float


class RankError(AssertionError):
    """A rank failed; the message holds its traceback."""


def run_ranks(
    function: Callable[..., Any], n: int, *args: Any, failing: bool = False, limit: float = 90.0, **kwargs: Any
) -> list[Any]:
    """Calls ``function(rank, *args, **kwargs)`` on ``n`` ranks.

    Args:
        function: At the top level of a module; what it returns must pickle.
        n: The size of the group, ``dist.group.WORLD`` in the ranks.
        args: Passed on, pickled.
        failing: Returns a :class:`Failure` for every rank that failed, instead of raising.
        limit: Seconds after which ranks are killed.
        kwargs: Passed on, pickled.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankError: If a rank failed or was too slow; the first to fail comes first in the message.

    """
    context = multiprocessing_context()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        # The server keeps the environment of its first use.
        call = (Path(folder), dict(os.environ), n, function, args, kwargs)
        processes: list[BaseProcess] = [context.Process(target=_rank, args=(rank, *call)) for rank in range(n)]
        try:
            for process in processes:
                process.start()
            _wait(processes, Path(folder), limit, patient=failing)
            outcomes = [_outcome(process, Path(folder), rank) for rank, process in enumerate(processes)]
        finally:
            _kill(processes)
    failures = {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, Failure)}
    if failures and not failing:
        in_order = sorted(failures.items(), key=lambda item: item[1].when)
        raise RankError("\n".join(f"rank {rank}: {failure.traceback}" for rank, failure in in_order))
    return outcomes


def _rank(
    rank: int,
    folder: Path,
    environment: dict[str, str],
    n: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n, timeout=timedelta(seconds=60)
        )
        # Else one rank might leave the group while another is still connecting to it.
        dist.barrier()
        content = pickle.dumps(function(rank, *args, **kwargs))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:
        content = pickle.dumps(Failure(type(error).__name__, str(error), traceback.format_exc(), time.time()))
    partial = folder / f"{rank}.partial"
    partial.write_bytes(content)
    partial.rename(folder / f"{rank}.pickle")


def _wait(processes: list[BaseProcess], folder: Path, limit: float, patient: bool) -> None:
    deadline = time.monotonic() + limit
    failed = False
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
        ended = [rank for rank, process in enumerate(processes) if not process.is_alive()]
        if not (patient or failed) and any(isinstance(_outcome(processes[r], folder, r), Failure) for r in ended):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE)


def _outcome(process: BaseProcess, folder: Path, rank: int) -> Any:
    path = folder / f"{rank}.pickle"
    if path.exists():
        return pickle.loads(path.read_bytes())
    if process.is_alive():
        message = "was still running and is killed"
        return Failure("Ended", message, message, time.time())
    # Killed: why the others fail, however late it is noticed.
    message = f"ended with {process.exitcode} and without a result"
    return Failure("Ended", message, message, 0.0)


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None:
            process.kill()
            process.join(10)
