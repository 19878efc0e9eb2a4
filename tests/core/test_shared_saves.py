"""One running checkpoint of several real processes: each saves its share, and all restore the same."""

from pathlib import Path

import pytest
from core_helpers import assert_same, saved_steps
from ranks import run_ranks
from shared_helpers import History, Run, assert_made_of, refreshed, resumed, state_bytes, trained

from lightning_scar.core.restoration import load

# -- each its share ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4])
def test_each_rank_writes_its_part_and_together_they_are_the_state(n: int, tmp_path: Path) -> None:
    url = str(tmp_path / "scar")
    runs: list[Run] = run_ranks(trained, n, url, steps=6, width=64)
    history = runs[0].history
    for other in runs[1:]:
        assert_same(other.history, history)
    assert_made_of(load(url), history, url)
    assert len(set(saved_steps(url).values())) > 2, "all of one age: nothing was mixed"
    mean = sum(run.written for run in runs) / n
    for run in runs:
        assert abs(run.written - mean) < 0.25 * mean
    for rank in range(n):
        own = [delta for delta in refreshed(url).deltas if delta.name.startswith(f"rank-{rank:04d}/")]
        assert own
        assert {delta.head.rank for delta in own} == {rank}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 3), (3, 2), (4, 1), (2, 4)])
def test_a_run_goes_on_with_any_number_of_ranks(n: int, m: int, tmp_path: Path) -> None:
    url, width = str(tmp_path / "scar"), 400
    history = run_ranks(trained, n, url, 3, width, block_size=4096)[0].history
    expected = load(url)
    # By turns, so that every block has been written again in the end.
    runs: list[Run] = run_ranks(resumed, m, url, 3, width, block_size=4096, policy="round_robin")
    for run in runs:
        assert_same(run.restored, expected)
    share = state_bytes(expected) / m
    for run in runs:
        # Headers and skeletons, which all of them read, and what the group says between the reads.
        assert share * 0.9 < run.read < share * 1.15 + 1e6
    assert_made_of(load(url), history | runs[0].history, url)
    store = refreshed(url)
    assert not store.damaged
    assert all(len(store.index.versions(key)) >= 2 for key in list(store.index.keys())[:50])


def test_a_state_wanders_among_changing_numbers_of_ranks(tmp_path: Path) -> None:
    history: History
    url, history = str(tmp_path / "scar"), {}
    for n in (3, 1, 2, 4, 2):
        history |= run_ranks(resumed if history else trained, n, url, 3)[0].history
        assert_made_of(load(url), history, url)
        total = sum(file.stat().st_size for file in Path(url).rglob("*.safetensors"))
        skeletons = sum(b.nbytes for d in refreshed(url).deltas for b in d.blocks if b.key.startswith("skeleton-"))
        assert total - skeletons < 6 * state_bytes(history[max(history)])
