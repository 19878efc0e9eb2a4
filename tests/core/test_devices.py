"""Saves beside a training that a device runs late: every save holds the values of its own step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from core_helpers import assert_same
from hypothesis import given
from hypothesis import strategies as st
from lockstep import Lockstep
from ordered_saves import AtOnce, Saves, saved
from torch import nn

from lightning_scar.core.devices import CPUQueue, HostBuffer, on_host, queue_of
from lightning_scar.core.restoration import load

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.complex128]


class Late(Lockstep):
    """Runs late, in an order that the seed decides."""

    def place(self, model: nn.Module) -> None:
        self.take(*model.parameters(), *model.buffers())

    def settle(self) -> None:
        pass


class Immediate(Lockstep):
    """The same device, made to catch up all the time."""

    def place(self, model: nn.Module) -> None:
        self.take(*model.parameters(), *model.buffers())

    def settle(self) -> None:
        self.synchronize()


@pytest.fixture(scope="module", params=[("lazy", "auto"), ("eager", "auto"), ("lazy", None)], ids=str)
def way(request: pytest.FixtureRequest) -> dict[str, Any]:
    """How to save."""
    staging, refresh = request.param
    return {"staging": staging, "refresh": refresh}


@pytest.fixture(scope="module")
def expected(way: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Saves:
    """What is saved where nothing is late."""
    return saved(tmp_path_factory.mktemp("at-once"), Immediate(0), **way)


def test_a_device_that_catches_up_all_the_time_saves_what_a_cpu_does(tmp_path: Path) -> None:
    on_cpu, on_device = saved(tmp_path / "cpu", AtOnce()), saved(tmp_path / "device", Immediate(0))
    assert list(on_cpu) == list(on_device) == [1, 2, 3, 4, 5, 6]
    assert {name for names in on_cpu.values() for name in names if name.startswith("refresh of")}
    for step, found in on_cpu.items():
        apart = {name: content for name, content in on_device[step].items() if not name.startswith("skeleton")}
        assert apart == {name: content for name, content in found.items() if not name.startswith("skeleton")}
    assert_same(load(tmp_path / "device"), load(tmp_path / "cpu"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("seed", range(3))
def test_every_save_holds_the_values_of_its_own_step_in_whatever_order_a_device_works(
    seed: int, way: dict[str, Any], expected: Saves, tmp_path: Path
) -> None:
    assert saved(tmp_path, Late(seed), **way) == expected


@pytest.mark.parametrize("broken", ["hold", "wait", "after"])
def test_without_its_order_a_save_is_wrong(broken: str, tmp_path: Path) -> None:
    expected = saved(tmp_path / "at-once", Immediate(0))
    assert any(saved(tmp_path / str(seed), Late(seed, broken)) != expected for seed in range(20))


# -- the host ----------------------------------------------------------------------------------------------------------


def test_the_cpu_does_everything_at_once() -> None:
    queue, done = queue_of([torch.zeros(2)]), []
    assert isinstance(queue, CPUQueue)
    queue.wait(queue.beside(lambda: done.append(1), queue.mark()))
    queue.hold(queue.mark())
    assert done == [1]
    assert isinstance(queue_of([]), CPUQueue)


def test_what_is_on_the_host_stays_where_it_is() -> None:
    tensors = [torch.zeros(2), torch.ones((), dtype=torch.int64)]
    assert all(a is b for a, b in zip(on_host(tensors), tensors, strict=True))


@given(st.lists(st.integers(0, 200), max_size=20), st.integers(0, 2000))
def test_pieces_of_the_buffer_never_overlap_and_are_aligned(sizes: list[int], reserved: int) -> None:
    buffer = HostBuffer()
    buffer.reserve(reserved)
    taken = [buffer.take(size) for size in sizes]
    for i, piece in enumerate(taken):
        piece.fill_(i)
        assert piece.data_ptr() % 16 == 0 or not len(piece)
    assert all((piece == i).all() for i, piece in enumerate(taken))
    assert [len(piece) for piece in taken] == sizes


def test_what_was_reserved_comes_from_one_stretch_of_memory() -> None:
    buffer = HostBuffer()
    buffer.take(10)
    buffer.reserve(1000)
    first, second = buffer.take(500), buffer.take(400)
    assert second.data_ptr() - first.data_ptr() == 512


def test_memory_is_reused_after_a_reset() -> None:
    buffer = HostBuffer()
    before = buffer.take(1000).data_ptr()
    buffer.reset()
    assert buffer.take(1000).data_ptr() == before


def test_after_a_reset_the_buffer_has_grown_to_one_stretch_for_all() -> None:
    buffer = HostBuffer()
    for _ in range(3):
        buffer.take(1000)
    buffer.reset()
    first, *_, last = [buffer.take(1000) for _ in range(3)]
    assert last.data_ptr() - first.data_ptr() == 2 * 1024


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_piece_serves_any_dtype(dtype: torch.dtype) -> None:
    buffer = HostBuffer()
    buffer.take(3)
    assert buffer.take(2 * dtype.itemsize).view(dtype).shape == (2,)
