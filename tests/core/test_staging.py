import pytest
import torch
from core_helpers import bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_scar.core.blocks import Group, Slot
from lightning_scar.core.staging import StagingBuffer, gather, payload, scatter, stage
from lightning_scar.storage.delta import checksum
from lightning_scar.storage.head import Version

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.complex128]


def group_of(*tensors: Tensor, rows_per_block: int = 2) -> Group:
    slots = tuple(Slot(f"slot{i}" if i else "param", tensor.dtype, None, ()) for i, tensor in enumerate(tensors))
    return Group("g", tuple(tensors[0].shape), slots, rows_per_block)


def numbered(rows: int, width: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(rows * width).view(rows, width).to(dtype)


def expected_rows(tensor: Tensor, group: Group, numbers: list[int]) -> Tensor:
    return torch.cat([tensor[slice(*group.span(number))] for number in numbers])


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, Group, list[int]]:
    rows, per_block = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    tensor = numbered(rows, draw(st.integers(1, 4)), draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        tensor = torch.stack([tensor, tensor], dim=1)[:, 1]
    group = group_of(tensor, rows_per_block=per_block)
    return tensor, group, sorted(draw(st.sets(st.integers(0, len(group) - 1), min_size=1)))


@given(choices())
def test_gathering_copies_exactly_the_rows_of_the_chosen_blocks(choice: tuple[Tensor, Group, list[int]]) -> None:
    tensor, group, numbers = choice
    expected = expected_rows(tensor, group, numbers)
    into = torch.zeros(expected.shape, dtype=tensor.dtype)
    gather(tensor, group, numbers, into)
    assert torch.equal(bits(into), bits(expected))


@given(choices())
def test_scattering_is_the_inverse_and_leaves_other_rows_alone(choice: tuple[Tensor, Group, list[int]]) -> None:
    tensor, group, numbers = choice
    target = torch.zeros_like(tensor)
    scatter(target, group, numbers, expected_rows(tensor, group, numbers))
    for number in range(len(group)):
        part = slice(*group.span(number))
        expected = tensor[part] if number in numbers else torch.zeros_like(tensor[part])
        assert torch.equal(bits(target[part]), bits(expected))


def test_staged_blocks_hold_every_slot_under_its_key() -> None:
    param, moment = numbered(5), numbered(5, dtype=torch.float64) * 10
    group = group_of(param, moment)
    [staged] = stage(StagingBuffer(), [(group, [param, moment], [0, 2])])
    first, last = staged.blocks()
    assert (first.key, last.key) == ("g[0:2]", "g[4:5]")
    assert torch.equal(first.copies[0].view(torch.float32).view(2, 3), param[0:2])
    assert torch.equal(last.copies[1].view(torch.float64).view(1, 3), moment[4:5])


def test_staged_copies_do_not_follow_the_live_tensor() -> None:
    param = numbered(4)
    [staged] = stage(StagingBuffer(), [(group_of(param), [param], [0, 1])])
    param.zero_()
    assert torch.equal(staged.copies[0].view(torch.float32).view(4, 3), numbered(4))


def test_a_block_becomes_data_with_the_shape_and_checksum_of_its_rows() -> None:
    param = numbered(5)
    [staged] = stage(StagingBuffer(), [(group_of(param), [param], [2])])
    [block] = staged.blocks()
    key, version, slots = block.data(Version(1, 2, 3))
    assert (key, version) == ("g[4:5]", Version(1, 2, 3))
    assert (slots["param"].dtype, slots["param"].shape, slots["param"].nbytes) == ("F32", (1, 3), 12)
    assert slots["param"].checksum == checksum(bytes(bits(param[4:5]).tolist()))


def test_a_dtype_that_safetensors_does_not_know_is_written_as_bytes() -> None:
    copy = bits(torch.ones(2, dtype=torch.complex128))
    made = payload(copy, torch.complex128, (2,))
    assert (made.dtype, made.shape, made.nbytes) == ("U8", (32,), 32)


# -- the buffer ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(0, 200))
def test_pieces_of_the_buffer_never_overlap_and_are_aligned(sizes: list[int], reserved: int) -> None:
    buffer = StagingBuffer()
    buffer.reserve(reserved, pieces=3)
    taken = [buffer.take(size) for size in sizes]
    for i, piece in enumerate(taken):
        piece.fill_(i)
        assert piece.data_ptr() % 16 == 0 or not len(piece)
    assert all((piece == i).all() for i, piece in enumerate(taken))
    assert [len(piece) for piece in taken] == sizes


def test_what_was_reserved_comes_from_one_stretch_of_memory() -> None:
    buffer = StagingBuffer()
    buffer.reserve(100, pieces=2)
    first, second = buffer.take(50), buffer.take(50)
    assert second.data_ptr() - first.data_ptr() == 64


def test_memory_is_reused_after_a_reset() -> None:
    buffer = StagingBuffer()
    before = buffer.take(1000).data_ptr()
    buffer.reset()
    assert buffer.take(1000).data_ptr() == before


def test_after_a_reset_the_buffer_has_grown_to_one_stretch_for_all() -> None:
    buffer = StagingBuffer()
    for _ in range(3):
        buffer.take(1000)
    buffer.reset()
    first, *_, last = [buffer.take(1000) for _ in range(3)]
    assert last.data_ptr() - first.data_ptr() == 2 * 1024


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_piece_serves_any_dtype(dtype: torch.dtype) -> None:
    buffer = StagingBuffer()
    buffer.take(3)
    assert buffer.take(2 * dtype.itemsize).view(dtype).shape == (2,)
