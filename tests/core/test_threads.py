import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_scar.core.threads import batches, pool


@pytest.mark.parametrize("size", [1, 3])
def test_threads_use_one_core_each_and_leave_those_of_the_training_alone(size: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pool(size, "tested") as threads:
            found = [threads.submit(torch.get_num_threads) for _ in range(10)]
            assert {each.result() for each in found} == {1}
            later = pool(1, "later")
            assert torch.get_num_threads() == 2
            later.shutdown()
    finally:
        torch.set_num_threads(before)


def test_threads_work_at_the_same_time_under_their_name() -> None:
    together, names = threading.Barrier(2, timeout=10), []
    with pool(2, "tested") as threads:
        for _ in range(2):
            threads.submit(lambda: (together.wait(), names.append(threading.current_thread().name)))
    assert all(name.startswith("tested") for name in names)
    assert len(set(names)) == 2


@given(st.lists(st.integers(0, 9)), st.integers(1, 20))
def test_batches_keep_the_order_and_are_large_enough_but_for_the_last(sizes: list[int], at_least: int) -> None:
    found = list(batches(sizes, lambda size: size, at_least))
    assert [size for batch in found for size in batch] == sizes
    assert all(batch and sum(batch) >= at_least for batch in found[:-1])
    assert all(sum(batch[:-1]) < at_least for batch in found)
