import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_scar.core.threads import batches, team


@pytest.mark.parametrize("size", [1, 3])
def test_every_piece_is_done_when_the_run_returns(size: int) -> None:
    done: list[int] = []
    with team(size) as run:
        run(done.append, range(100))
        assert sorted(done) == list(range(100))


def test_a_team_works_at_the_same_time_and_a_single_one_in_the_calling_thread() -> None:
    together = threading.Barrier(2, timeout=10)
    with team(2) as run:
        run(lambda _: together.wait() and None, range(2))
    threads: list[threading.Thread] = []
    with team(1) as run:
        run(lambda _: threads.append(threading.current_thread()), range(2))
    assert set(threads) == {threading.current_thread()}


@pytest.mark.parametrize("size", [1, 2])
def test_an_error_in_a_piece_reaches_the_caller(size: int) -> None:
    with pytest.raises(ZeroDivisionError), team(size) as run:
        run(lambda piece: 1 // piece and None, [1, 0, 1])


@given(st.lists(st.integers(0, 9)), st.integers(1, 20))
def test_batches_keep_the_order_and_are_large_enough_but_for_the_last(sizes: list[int], at_least: int) -> None:
    found = list(batches(sizes, lambda size: size, at_least))
    assert [size for batch in found for size in batch] == sizes
    assert all(batch and sum(batch) >= at_least for batch in found[:-1])
    assert all(sum(batch[:-1]) < at_least for batch in found)
