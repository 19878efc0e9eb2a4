"""The collectives of a recovery, on real processes."""

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from lightning_scar.core import ranks as module
from lightning_scar.core.ranks import Ranks

# -- gather ------------------------------------------------------------------------------------------------------------


def gathered(rank: int) -> tuple[int, int, list[object]]:
    ranks = Ranks.of_default_group()
    return ranks.rank, ranks.world_size, ranks.gather({"rank": rank, "many": "x" * 1000 * rank})


@pytest.mark.parametrize("n", [1, 2, 3])
def test_gather_gives_all_values_by_rank(n: int) -> None:
    expected = [{"rank": rank, "many": "x" * 1000 * rank} for rank in range(n)]
    assert run_ranks(gathered, n) == [(rank, n, expected) for rank in range(n)]


def test_without_a_process_group_a_process_is_alone() -> None:
    alone = Ranks.of_default_group()
    assert (alone.rank, alone.world_size, alone.gather(7)) == (0, 1, [7])
    piece = torch.arange(3, dtype=torch.uint8)
    alone.share_out([[piece]])
    assert piece.tolist() == [0, 1, 2]


# -- together ----------------------------------------------------------------------------------------------------------


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("cannot travel")
        self.hook = lambda: None


class Unbuildable(Exception):
    """Pickles, but its arguments are not those of its constructor."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


ERRORS = {"value": ValueError("mine"), "file": FileNotFoundError(2, "gone", "/a"), "lambda": Unpicklable()}


def fails_together(rank: int, error: str, failing: list[int]) -> tuple[str, str, bool, object]:
    ranks = Ranks.of_default_group()
    own = Unbuildable("this", "that") if error == "arguments" else ERRORS[error]

    def function() -> int:
        if rank in failing:
            raise own
        return rank

    caught: Exception = RuntimeError("nothing was raised")
    try:
        ranks.together(function)
    except Exception as found:
        caught = found
    # The group is in step: another collective follows.
    return type(caught).__name__, str(caught), caught is own, ranks.together(lambda: rank + 1)


@pytest.mark.parametrize("failing", [[0], [1], [2], [0, 2], [0, 1, 2]])
def test_an_error_of_one_is_raised_on_all(failing: list[int]) -> None:
    for rank, (name, message, is_own, after) in enumerate(run_ranks(fails_together, 3, "file", failing)):
        assert (name, message) == ("FileNotFoundError", "[Errno 2] gone: '/a'")
        assert is_own == (rank in failing)
        assert after == rank + 1


@pytest.mark.parametrize(("error", "says"), [("lambda", "cannot travel"), ("arguments", "this and that")])
def test_an_error_that_cannot_be_sent_arrives_in_words(error: str, says: str) -> None:
    own, other = run_ranks(fails_together, 2, error, [0])
    assert own[1:] == (says, True, 1)
    assert other[0] == "RuntimeError"
    assert says in other[1]
    assert other[3] == 2


def raises_another(rank: int) -> tuple[str, int]:
    def function() -> None:
        if rank:
            raise ValueError(f"of rank {rank}")

    try:
        Ranks.of_default_group().together(function)
    except ValueError as found:
        return str(found), rank
    return "", rank


def test_of_several_errors_a_rank_gets_its_own_else_that_of_the_first() -> None:
    assert run_ranks(raises_another, 3) == [("of rank 1", 0), ("of rank 1", 1), ("of rank 2", 2)]


def test_alone_the_error_is_the_functions() -> None:
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:
        Ranks().together(lambda: (_ for _ in ()).throw(error))
    assert caught.value is error


# -- share_out ---------------------------------------------------------------------------------------------------------


def filled(sizes: list[int], owner: int, known: bool) -> list[Tensor]:
    """Pieces within one piece of memory, as blocks of a tensor are: what lies between them must not change."""
    pieces = []
    for i, size in enumerate(sizes):
        memory = torch.full((size + 2,), 255, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(1000 * owner + i)
        values = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
        memory[1:-1] = values if known else 0
        pieces.append(memory[1:-1])
    return pieces


def shared_out(rank: int, sizes: list[list[int]]) -> int:
    ranks = Ranks.of_default_group()
    for module._MESSAGE in (1 << 26, 64, 1):
        share_out(ranks, sizes)
    return len(ranks.gather(None))


def share_out(ranks: Ranks, sizes: list[list[int]]) -> None:
    pieces = [filled(own, owner, known=owner == ranks.rank) for owner, own in enumerate(sizes)]
    ranks.share_out(pieces)
    for owner, own in enumerate(sizes):
        for found, expected in zip(pieces[owner], filled(own, owner, known=True), strict=True):
            assert torch.equal(found, expected), (owner, len(expected))
            edges = found.as_strided((len(found) + 2,), (1,), found.storage_offset() - 1)
            assert edges[0] == edges[-1] == 255, "bytes beside a piece were changed"


ODD = [1, 63, 64, 65, 128, 200, 7, 57, 1000, 1, 64]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([ODD], id="alone"),
        pytest.param([ODD, ODD[::-1]], id="both"),
        pytest.param([[], ODD], id="one has nothing"),
        pytest.param([[], []], id="nobody has anything"),
        pytest.param([[0, 5, 0], [0]], id="empty pieces"),
        pytest.param([ODD, [], [3] * 40], id="three"),
    ],
)
def test_all_ranks_get_what_each_has(sizes: list[list[int]]) -> None:
    assert run_ranks(shared_out, len(sizes), sizes) == [len(sizes)] * len(sizes)
