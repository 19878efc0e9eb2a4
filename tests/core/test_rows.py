"""Blocks as rows of matrices: cut, and copied to the host."""

import pytest
import torch
from core_helpers import bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_scar.core.blocks import Group, Slot
from lightning_scar.core.rows import gather, pieces

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.int8,
    torch.uint16,
    torch.uint64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.complex128,
]


def group_of(tensor: Tensor, rows_per_block: int = 2) -> Group:
    return Group("g", tuple(tensor.shape), (Slot("param", tensor.dtype, None, ()),), rows_per_block)


def numbered(rows: int, width: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(rows * width).view(rows, width).to(dtype)


def rows_of_blocks(tensor: Tensor, group: Group, numbers: list[int]) -> Tensor:
    return torch.cat([tensor[slice(*group.span(number))] for number in numbers])


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, Group, list[int]]:
    rows, per_block = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    tensor = numbered(rows, draw(st.integers(1, 4)), draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["contiguous", "with gaps", "transposed"]))
    if layout == "with gaps":
        tensor = torch.stack([tensor, tensor], dim=1)[:, 1]
    elif layout == "transposed":
        tensor = tensor.t().contiguous().t()
    group = group_of(tensor, per_block)
    return tensor, group, sorted(draw(st.sets(st.integers(0, len(group) - 1), min_size=1)))


@given(choices())
def test_the_pieces_are_all_blocks_in_order_without_a_copy(choice: tuple[Tensor, Group, list[int]]) -> None:
    tensor, group, _ = choice
    found = list(pieces(tensor, group))
    assert [n for piece in found for n in range(len(group))[piece.numbers]] == list(range(len(group)))
    for piece in found:
        for number, block in zip(range(len(group))[piece.numbers], piece.blocks, strict=True):
            assert torch.equal(bits(block), bits(tensor[slice(*group.span(number))]))
            assert block.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


@given(choices())
def test_gathering_copies_exactly_the_rows_of_the_chosen_blocks(choice: tuple[Tensor, Group, list[int]]) -> None:
    tensor, group, numbers = choice
    expected = rows_of_blocks(tensor, group, numbers)
    into = torch.zeros(expected.numel(), dtype=tensor.dtype)
    gather(tensor, group, numbers, into)
    assert torch.equal(bits(into), bits(expected.reshape(-1)))
    tensor.zero_()
    assert torch.equal(bits(into), bits(expected.reshape(-1))), "not a copy"


@given(choices())
def test_what_is_gathered_becomes_the_base_and_other_rows_of_it_are_left_alone(
    choice: tuple[Tensor, Group, list[int]],
) -> None:
    tensor, group, numbers = choice
    before = torch.zeros_like(tensor)
    base = before.clone()
    into = torch.zeros(rows_of_blocks(tensor, group, numbers).numel(), dtype=tensor.dtype)
    gather(tensor, group, numbers, into, base)
    for number in range(len(group)):
        part = slice(*group.span(number))
        assert torch.equal(bits(base[part]), bits((tensor if number in numbers else before)[part]))


def test_nothing_is_gathered_of_no_blocks() -> None:
    tensor = numbered(4)
    gather(tensor, group_of(tensor), [], torch.empty(0))


@pytest.mark.parametrize("numbers", [[0, 1], [2], [0, 2], [1]])
def test_the_last_block_may_be_shorter(numbers: list[int]) -> None:
    tensor = numbered(5)
    into = torch.zeros(sum(3 * (2 if number < 2 else 1) for number in numbers))
    gather(tensor, group_of(tensor), numbers, into)
    assert torch.equal(into.view(-1, 3), rows_of_blocks(tensor, group_of(tensor), numbers))


def test_a_scalar_is_one_row() -> None:
    scalar = torch.tensor(3.0)
    into, base = torch.zeros(1), torch.zeros(1)
    gather(scalar.unsqueeze(0), group_of(scalar), [0], into, base)
    assert into.tolist() == base.tolist() == [3.0]
