"""Forked processes that form a group, and may die."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

#: Seconds that the others may go on when one process has failed.
_GRACE = 10.0


def run(function: Callable[..., Any], ranks: int, folder: Path, *args: Any, limit: float = 120.0) -> list[int | None]:
    """Call ``function(rank, *args)`` in forked processes, whose group is the default one if there are several.

    The caller must not have computed anything with torch, whose threads a fork does not copy.

    Args:
        function: The function. What it raises is written to ``error-<rank>.txt``, its last line on stderr.
        ranks: The number of processes.
        folder: An existing folder.
        args: Further arguments.
        limit: Seconds after which the processes are killed.

    Returns:
        The exit codes: minus the number of a signal, ``None`` for a process that did not end.

    """
    store = folder / f"store-{time.monotonic_ns()}"
    processes: list[BaseProcess] = [
        get_context("fork").Process(target=_rank, args=(rank, ranks, store, function, args)) for rank in range(ranks)
    ]
    sys.stdout.flush()
    for process in processes:
        process.start()
    deadline = time.monotonic() + limit
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + _GRACE)
        next((process for process in processes if process.is_alive()), processes[0]).join(0.05)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def _rank(rank: int, ranks: int, store: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> NoReturn:
    torch.set_num_threads(1)
    code: Any = 0
    try:
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "benchmark"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
            shared = dist.FileStore(str(store), ranks)  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=shared, rank=rank, world_size=ranks)
        function(rank, *args)
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        (store.parent / f"error-{rank}.txt").write_text(traceback.format_exc())
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else int(bool(code)))
