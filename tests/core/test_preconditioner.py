import math
from typing import Any

import pytest
import torch
from core_helpers import Training, written_blocks
from torch import Tensor, nn, optim

from lightning_scar.core.blocks import Group, Slot
from lightning_scar.core.live_state import Dissection
from lightning_scar.core.preconditioner import preconditioners, sampled_squares, squares_slot
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.rows import pieces
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings


def group_of(tensor: Tensor, *words: str, rows_per_block: int = 1) -> Group:
    slots = tuple(Slot(word, tensor.dtype, None, ()) for word in ("param", *words))
    return Group("weight", tuple(tensor.shape), slots, rows_per_block)


def of(groups: list[Group], live: list[list[Tensor]], step: int = 1) -> Tensor:
    """Of some groups, from their live tensors."""
    squares = [torch.empty(0)]
    for group, tensors in zip(groups, live, strict=True):
        slot = squares_slot(group)
        found = [torch.full((len(group),), math.nan)]
        if slot is not None:
            found = [sampled_squares(piece.blocks, step) for piece in pieces(tensors[slot], group)]
        squares += found
    return preconditioners(groups, torch.cat(squares).double())


def found(squares: Tensor, rows_per_block: int = 1, word: str = "exp_avg_sq") -> list[float]:
    group = group_of(squares, word, rows_per_block=rows_per_block)
    values: list[float] = of([group], [[torch.zeros_like(squares), squares]]).tolist()
    return values


@pytest.mark.parametrize("rows_per_block", [1, 2, 3, 4, 5, 7, 1 << 40])
@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 2, 3)])
def test_it_is_the_root_of_the_mean_square_of_each_block_over_that_of_all(
    shape: tuple[int, ...], rows_per_block: int
) -> None:
    torch.manual_seed(0)
    squares = torch.rand(shape)
    roots = torch.stack([block.double().mean().sqrt() for block in torch.split(squares, rows_per_block)])
    assert found(squares, rows_per_block) == pytest.approx((roots / roots.mean()).tolist())


@pytest.mark.parametrize(
    "squares",
    [
        torch.rand(4, 6, dtype=torch.float64),
        torch.rand(4, 6).bfloat16(),
        torch.rand(6, 4).t(),
        torch.rand(4, 2, 3, 2).to(memory_format=torch.channels_last),
    ],
    ids=["float64", "bfloat16", "transposed", "channels-last"],
)
def test_dtype_and_layout_do_not_matter(squares: Tensor) -> None:
    assert found(squares, 3) == pytest.approx(found(squares.float().contiguous(), 3))


def test_who_has_no_squared_gradients_counts_as_the_mean() -> None:
    squares = torch.tensor([[1.0], [9.0]])
    known, other = group_of(squares, "exp_avg", "exp_avg_sq"), group_of(squares, "momentum_buffer")
    live = [[squares, squares], [squares, squares, squares]]
    assert of([other, known], live).tolist() == [1.0, 1.0, 0.5, 1.5]
    assert of([other], live[:1]).tolist() == [1.0, 1.0]
    assert of([], []).tolist() == []


def test_sums_of_squares_are_not_compared_with_means() -> None:
    squares = torch.tensor([[1.0], [9.0]])
    adagrad, adam = group_of(squares, "sum"), group_of(squares, "exp_avg", "exp_avg_sq")
    live = [[squares, 100 * squares], [squares, squares, squares]]
    assert of([adagrad, adam], live).tolist() == [0.5, 1.5, 0.5, 1.5]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_counts_as_the_mean_and_spoils_no_other(bad: float) -> None:
    assert found(torch.tensor([1.0, bad, 9.0])) == [0.5, 1.0, 1.5]


def test_of_large_blocks_some_rows_stand_for_all_and_all_have_their_turn_whatever_the_interval() -> None:
    squares = torch.ones(60, 1000)
    squares[30:] = 4
    # One row of the first block has had all of its gradients.
    squares[:30] = 0
    squares[4] = 30
    group = group_of(squares, "exp_avg_sq", rows_per_block=30)
    ratios = []
    for step in range(0, 1000, 10):
        first, second = of([group], [[squares, squares]], step).tolist()
        ratios.append(first / second)
    # Three of the 30 rows are looked at, one in ten.
    assert max(ratios) == pytest.approx(math.sqrt(10 / 4))
    assert 80 <= sum(ratio < 0.01 for ratio in ratios) <= 97


def test_before_there_are_gradients_all_count_alike() -> None:
    assert found(torch.zeros(3)) == [1.0, 1.0, 1.0]


def test_without_gradients_a_block_counts_a_little() -> None:
    assert found(torch.tensor([0.0, 4.0])) == [1e-3, 2.0]


def test_complex_parameters_count_alike() -> None:
    assert found(torch.tensor([1.0, 9.0], dtype=torch.complex64)) == [1.0, 1.0]


OPTIMIZERS: list[Any] = [
    optim.Adam,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Adadelta,
    optim.Adagrad,
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.__name__)
def test_the_squared_gradients_of_torchs_optimizers_are_found(optimizer: Any) -> None:
    model = nn.Linear(4, 3, bias=False)
    training = Training(model, optimizer(model.parameters()))
    model.weight.grad = torch.tensor([[1.0], [2.0], [3.0]]).expand(3, 4).clone()
    training.optimizers[0].step()
    state = Dissection(Ranks(), 16).take_apart(
        training.checkpoint(), {("optimizer_states", 0): training.optimizers[0]}, model.parameters()
    )
    at = [group.name for group in state.map.groups].index("state_dict/weight")
    values = of([state.map.groups[at]], [state.of(state.map)[at]])
    assert values.tolist() == pytest.approx([0.5, 1.0, 1.5], rel=1e-4)


def test_of_blocks_that_moved_alike_the_one_with_the_larger_gradients_is_saved(memory_url: str) -> None:
    model = nn.Linear(4, 6, bias=False)
    training = Training(model, optim.Adam(model.parameters(), lr=0.1))
    with RunningCheckpoint(
        memory_url, Settings(fraction=1 / 3, block_size=16, staging="eager", refresh=None)
    ) as running:
        for _ in range(2):
            # Adam's steps are as long whatever the gradients.
            model.weight.grad = torch.tensor([[1.0], [5.0], [2.0], [3.0], [6.0], [4.0]]).expand(6, 4).clone()
            training.optimizers[0].step()
            training.steps += 1
            training.save(running)
    assert written_blocks(memory_url, 2) == {"state_dict/weight[1:2]", "state_dict/weight[4:5]"}
