"""The process group that fails as NCCL's does, on real processes."""

import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collectives import results
from ranks import Failure, run_ranks

from lightning_scar.elastic.worker import groups
from lightning_scar.testing import NAME

#: As torch's are if nobody sets them, but that it waits a minute.
DEFAULT = {"TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1"}
MONITORED = {**DEFAULT, "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}


def form(rank: int, n: int, folder: Path, timeout: float = 60.0) -> None:
    dist.destroy_process_group()
    store = f"file://{folder}/store"
    dist.init_process_group(NAME, init_method=store, rank=rank, world_size=n, timeout=timedelta(seconds=timeout))


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


# -- collectives -------------------------------------------------------------------------------------------------------


def twice(rank: int, n: int, folder: Path) -> tuple[list[Any], list[Any]]:
    over_gloo = results(rank, n)
    form(rank, n, folder)
    return over_gloo, results(rank, n)


def test_collectives_are_those_of_gloo(tmp_path: Path) -> None:
    for over_gloo, found in run_ranks(twice, 3, 3, tmp_path):
        assert repr(found) == repr(over_gloo)


def steps(rank: int, n: int, folder: Path) -> list[Any]:
    form(rank, n, folder)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.full((2, 3), float(rank))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def test_ddp_keeps_all_ranks_alike(tmp_path: Path) -> None:
    first, second = run_ranks(steps, 2, 2, tmp_path)
    assert repr(first) == repr(second)


def asynchronous(rank: int, folder: Path) -> bool:
    form(rank, 2, folder)
    if rank == 1:
        wait_for(folder / "launched")
    work = dist.all_reduce(torch.ones(1), async_op=True)
    assert work is not None
    was_done = bool(work.is_completed())
    if rank == 0:
        (folder / "launched").touch()
    work.wait()
    return was_done or not work.is_completed()


def test_a_collective_returns_before_it_is_done(tmp_path: Path) -> None:
    assert run_ranks(asynchronous, 2, tmp_path)[0] is False


# -- a peer that dies --------------------------------------------------------------------------------------------------


def left_alone(rank: int, folder: Path) -> dict[str, Any]:
    form(rank, 3, folder)
    dist.all_reduce(torch.ones(1))
    if rank == 2:
        os._exit(0)
    numbers, later = torch.ones(2), torch.ones(2)
    work = dist.all_reduce(later, async_op=True)
    thread = threading.Thread(target=lambda: dist.all_reduce(numbers))
    thread.start()
    thread.join(1.0)
    found: dict[str, Any] = {"blocked": thread.is_alive(), "noticed": groups.failure()}
    groups.abort_all()
    thread.join(20)
    assert work is not None
    work.wait()
    found |= {"numbers": [*numbers.tolist(), *later.tolist()], "ended": not thread.is_alive()}
    world: Any = dist.group.WORLD
    with pytest.raises(RuntimeError, match="aborted already"):
        world.abort()
    with pytest.raises(dist.DistBackendError, match="was aborted"):
        dist.all_reduce(torch.ones(1))
    groups.leave_all()
    return {**found, "left": not dist.is_initialized()}


def test_a_dead_peer_makes_no_error_but_garbage_when_the_group_is_aborted(tmp_path: Path) -> None:
    *survivors, dead = run_ranks(left_alone, 3, tmp_path, failing=True)
    assert isinstance(dead, Failure)
    for found in survivors:
        assert str(found.pop("numbers")) == "[nan, nan, nan, nan]", found
        assert found == {"blocked": True, "noticed": "", "ended": True, "left": True}


# -- torch's watchdog --------------------------------------------------------------------------------------------------


def late(rank: int, folder: Path, environment: dict[str, str], quiet: bool) -> tuple[str, bool]:
    os.environ.update(environment)
    if quiet:
        os.environ.update(groups._WATCHDOG)
    form(rank, 2, folder, timeout=0.3 if rank == 0 else 60)
    dist.barrier()
    if rank == 1:
        wait_for(folder / "over")
        return "", True
    work = dist.all_reduce(torch.ones(1), async_op=True)
    assert work is not None
    deadline = time.monotonic() + 20
    while not groups.failure() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    (folder / "over").touch()
    groups.abort_all()
    work.wait()
    return groups.failure(), True


@pytest.mark.parametrize("environment", [DEFAULT, MONITORED], ids=["default", "monitored"])
def test_the_watchdog_ends_the_process(environment: dict[str, str], tmp_path: Path) -> None:
    ends = run_ranks(late, 2, tmp_path, environment, quiet=False, failing=True, limit=30)
    # The other one's, too: it looks at the same store.
    assert ["ended with -6" in end.message for end in ends] == [True, True], ends


def test_but_not_with_the_options_of_a_member_whatever_it_inherits(tmp_path: Path) -> None:
    (failure, is_alive), _ = run_ranks(late, 2, tmp_path, {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}, quiet=True)
    assert is_alive
    assert "TIMEOUT" in failure
