"""The group over gloo that any thread can wake, on real processes."""

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collectives import results
from ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel

from lightning_scar.elastic.worker import gloo, groups
from lightning_scar.elastic.worker.errors import Loss
from lightning_scar.elastic.worker.gloo import Gloo

#: More than sockets buffer.
NUMBERS = 1 << 24


def form(rank: int, n: int, folder: Path) -> Gloo:
    dist.destroy_process_group()
    store = dist.FileStore(str(folder / "store"), n)
    groups.form("gloo", store=store, rank=rank, world_size=n, timeout=timedelta(seconds=80))
    assert isinstance(dist.group.WORLD, Gloo)
    return dist.group.WORLD


def twice(rank: int, folder: Path) -> tuple[list[Any], list[Any]]:
    expected = [*results(rank, 3), dist.get_backend(), dist.get_backend_config()]
    form(rank, 3, folder)
    dist.all_reduce(torch.ones(1), group=dist.new_group([0, 1, 2]))
    dist.monitored_barrier()
    return expected, [*results(rank, 3), dist.get_backend(), dist.get_backend_config()]


def test_it_is_gloo_to_all_that_use_it(tmp_path: Path) -> None:
    for expected, found in run_ranks(twice, 3, tmp_path):
        assert repr(found) == repr(expected)


def gradients(rank: int) -> list[Any]:
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)))
    model(torch.arange(6.0).view(2, 3) + rank).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def both(rank: int, folder: Path) -> tuple[list[Any], list[Any]]:
    expected = gradients(rank)
    form(rank, 2, folder)
    return expected, gradients(rank)


def test_ddp_reduces_the_same_numbers(tmp_path: Path) -> None:
    for expected, found in run_ranks(both, 2, tmp_path):
        assert repr(found) == repr(expected)


def futures(rank: int, folder: Path) -> tuple[list[float], list[float], bool]:
    form(rank, 2, folder)
    work = dist.all_reduce(torch.ones(2), async_op=True)
    assert work is not None
    # As a communication hook does.
    chained = work.get_future().then(lambda future: future.value()[0] * 10)
    work.wait(timedelta(seconds=60))
    return work.get_future().value()[0].tolist(), chained.wait().tolist(), work.is_completed()


def test_what_is_asked_of_a_work(tmp_path: Path) -> None:
    assert run_ranks(futures, 2, tmp_path) == [([2.0, 2.0], [20.0, 20.0], True)] * 2


def test_a_wrong_argument_raises_as_ever() -> None:
    groups.form("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises((TypeError, RuntimeError)):
        dist.group.WORLD.allreduce("not a tensor")  # type: ignore[union-attr]
    began = time.monotonic()
    dist.destroy_process_group()
    assert time.monotonic() - began < gloo._SETTLE_SECONDS


# -- a peer that dies while a large tensor is on its way ---------------------------------------------------------------


def interrupted(rank: int, folder: Path, sender: int) -> tuple[bool, str, bool]:
    group = form(rank, 2, folder)
    numbers = torch.ones(NUMBERS)
    dist.barrier()
    if rank == 1:
        (folder / "process").write_text(str(os.getpid()))
        dist.broadcast(numbers, sender, async_op=True)
        time.sleep(0.5 if sender == 0 else 0.01)
        os.kill(os.getpid(), signal.SIGSTOP)
    if sender == 0:
        time.sleep(1)  # Until the other waits for it, and reads nothing.
    work = dist.broadcast(numbers, sender, async_op=True)
    assert work is not None
    time.sleep(1)
    os.kill(int((folder / "process").read_text()), signal.SIGKILL)
    time.sleep(0.5)
    is_forgotten = not work.is_completed()
    threading.Timer(0.2, group.abort).start()
    began = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        work.wait()
    with pytest.raises(RuntimeError):
        dist.all_reduce(numbers)
    del group
    dist.destroy_process_group()
    groups.form("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce(numbers)
    return is_forgotten, str(raised.value), gloo.has_raised(raised.value) and time.monotonic() - began < 20


def test_a_send_that_gloo_forgets_is_woken(tmp_path: Path) -> None:
    (is_forgotten, message, is_over), _ = run_ranks(interrupted, 2, tmp_path, 0, failing=True)
    assert is_over
    assert is_forgotten, "gloo has been mended: plain groups of it will do"
    assert message == "gloo: a peer is lost, and what waits for it was aborted"


def test_a_receipt_that_gloo_forgets_is_woken(tmp_path: Path) -> None:
    (_, _, is_over), _ = run_ranks(interrupted, 2, tmp_path, 1, failing=True)
    assert is_over


def left_alone(rank: int, folder: Path) -> str:
    form(rank, 2, folder)
    model = DistributedDataParallel(torch.nn.Linear(3, 3))
    if rank == 1:
        os._exit(0)
    with pytest.raises(RuntimeError) as raised:
        model(torch.ones(1, 3)).sum().backward()
    assert gloo.has_raised(raised.value)
    return Loss.of(raised.value, 0.0).failure


def test_an_error_of_gloo_comes_through(tmp_path: Path) -> None:
    assert "gloo/transport/tcp" in run_ranks(left_alone, 2, tmp_path, failing=True)[0][:60]


def deserted(rank: int, folder: Path) -> tuple[bool, float]:
    dist.destroy_process_group()
    store = Deserter(str(folder / "store"), 2) if rank == 1 else dist.FileStore(str(folder / "store"), 2)
    began = time.monotonic()
    stops, timeout = (lambda: time.monotonic() - began > 1), timedelta(seconds=60)
    try:
        gloo.form(stops, store=store, rank=rank, world_size=2, timeout=timeout)
        # The one who connects cannot know that the other is dead, and not busy.
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        return gloo.has_raised(error), time.monotonic() - began
    return False, 0.0


class Deserter(dist.Store):
    """Ends the process when it has told its address, and asks for that of others."""

    def __init__(self, path: str, members: int) -> None:
        super().__init__()
        self._store = dist.FileStore(path, members)

    def set(self, key: str, value: Any) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        os._exit(0)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        os._exit(0)


def test_a_group_does_not_wait_for_who_has_told_its_address_and_died(tmp_path: Path) -> None:
    (has_raised, seconds), _ = run_ranks(deserted, 2, tmp_path, failing=True)
    assert has_raised
    assert seconds < 30
