"""Ranks that lose their folder, cannot write or are slow, directories that are not shared: the others go on."""

import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from core_helpers import assert_same, saved_steps
from ranks import Failure, run_ranks
from shared_helpers import assert_made_of, copied, go_on, make_training, opened, quietly, refreshed, trained
from torch import nn, optim

from lightning_scar.core.ranks import Ranks
from lightning_scar.core.restoration import load
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.storage.lease import FILE


def recovered(rank: int, url: str, with_initial: bool) -> tuple[dict[str, Any], str, int]:
    training = make_training()
    with opened(url) as running:
        found, said = quietly(running, initial=copied(training) if with_initial else None)
        found = {**found}
        training.load(found)
        found = copied(training)
        go_on(training, running, 2)
        training.save(running, full=True)
    return found, said, training.steps


def recover(url: str, n: int) -> dict[str, Any]:
    """All ranks get the same with a report, and without initial values none gets anything."""
    failures = run_ranks(recovered, n, url, False, failing=True)
    assert [failure.type for failure in failures] == ["IncompleteError"] * n
    assert all("block state_dict/" in failure.message for failure in failures)
    results = run_ranks(recovered, n, url, True)
    for found, _, _ in results[1:]:
        assert_same(found, results[0][0])
    assert [bool(said) for _, said, _ in results] == [True] + [False] * (n - 1), "one of them says it"
    assert "initial values" in results[0][1]
    assert "Recovery: " in results[0][1]
    after = load(url)
    assert after["global_step"] == results[0][2]
    assert set(saved_steps(url).values()) == {results[0][2]}
    return results[0][0]


def trained_side_by_side(rank: int, url: str) -> None:
    """No rank is through before another one's first save: the run would not count without that rank's folder."""
    training = make_training()
    with opened(url) as running:
        for _ in range(4):
            go_on(training, running, 1)
            dist.barrier()


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 2)])
def test_the_folder_of_a_rank_is_lost(n: int, m: int, tmp_path: Path) -> None:
    url = str(tmp_path / "scar")
    run_ranks(trained_side_by_side, n, url)
    before, initial = load(url), copied(make_training())
    lost = {b.key for d in refreshed(url).deltas for b in d.blocks if d.name.startswith("rank-0001/")}
    shutil.rmtree(tmp_path / "scar" / "rank-0001")
    found = recover(url, m)
    kept = 0
    for name, tensor in found["state_dict"].items():
        for i in range(len(tensor)):
            is_lost = any(_covers(key, name, i) for key in lost)
            expected = initial if is_lost else before
            assert torch.equal(tensor[i], expected["state_dict"][name][i]), (name, i)
            kept += not is_lost
    assert kept


def _covers(key: str, name: str, row: int) -> bool:
    if not key.startswith(f"state_dict/{name}["):
        return False
    start, stop = key.rpartition("[")[2].rstrip("]").split(":")
    return int(start) <= row < int(stop)


def test_a_delta_of_a_rank_is_cut_short(tmp_path: Path) -> None:
    url = str(tmp_path / "scar")
    history = run_ranks(trained, 2, url, 5)[0].history
    newest = sorted((tmp_path / "scar" / "rank-0001").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-10])
    results = run_ranks(recovered, 2, url, False)
    assert_same(results[0][0], results[1][0])
    assert newest.name in results[0][1]
    assert not results[1][1]
    assert results[0][0]["global_step"] == 5
    assert_made_of(load(url), history | {7: load(url)}, url)


def test_every_block_of_a_rank_is_damaged_and_older_versions_serve(tmp_path: Path) -> None:
    url = str(tmp_path / "scar")
    history = run_ranks(trained, 3, url, 4, fraction=1.0)[0].history
    newest = sorted((tmp_path / "scar" / "rank-0002").iterdir())[-1]
    content = bytearray(newest.read_bytes())
    own = next(d for d in refreshed(url).deltas if d.name.endswith(f"rank-0002/{newest.name}"))
    for block in own.blocks:
        content[next(iter(block.slots.values())).start] ^= 255
    newest.write_bytes(content)
    results = run_ranks(recovered, 2, url, False)
    assert_same(results[0][0], results[1][0])
    assert "older versions" in results[0][1]
    assert "and " in results[0][1]
    steps = {
        step
        for name, tensor in results[0][0]["state_dict"].items()
        for row in range(len(tensor))
        for step in history
        if torch.equal(tensor[row], history[step]["state_dict"][name][row])
    }
    assert steps == {1, 4}, "the first save is a full one"


def stops_early(rank: int, url: str) -> Any:
    training = make_training()
    with opened(url, fraction=1.0) as running:
        history = go_on(training, running, 2)
        for _ in range(3):
            training.step()
            if rank == 0:
                training.save(running)
            history[training.steps] = copied(training)
    return history


def test_a_rank_that_stopped_saving_early_gives_its_old_blocks(tmp_path: Path) -> None:
    url = str(tmp_path / "scar")
    history = run_ranks(stops_early, 2, url)[0]
    assert set(saved_steps(url).values()) == {2, 5}
    assert_made_of(load(url), history, url)
    expected = load(url)
    for found, _, _ in run_ranks(recovered, 3, url, False):
        assert_same(found, expected)


def killed_when_moments_appear(rank: int, url: str, more: int) -> Any:
    training = make_training()
    with opened(url) as running:
        training.save(running)
        before = copied(training)
        for _ in range(more):
            training.step()
            if rank == 0:
                training.save(running)
    return before


@pytest.mark.parametrize("n", [1, 2])
def test_a_kill_between_the_ranks_first_saves_of_a_new_map_leaves_the_state_of_the_old_one(
    n: int, tmp_path: Path
) -> None:
    """Of the other rank's blocks nothing with moments is on disk yet."""
    url = str(tmp_path / "scar")
    before, _ = run_ranks(killed_when_moments_appear, 2, url, 1)
    assert_same(load(url), before)
    for found, said, _ in run_ranks(recovered, n, url, True):
        assert_same(found, before)
        assert "initial values" not in said


# -- a rank that cannot write, or not fast -----------------------------------------------------------------------------


def with_a_file_in_the_way(rank: int, url: str, fail_from: int) -> Any:
    training = make_training()
    with warnings.catch_warnings(), opened(url, fraction=1.0) as running:
        warnings.simplefilter("ignore")
        history, ranks = {}, Ranks.of_default_group()
        for _ in range(fail_from):
            # Side by side: rank 0's second save has to find the first of both, or the run does not count.
            history |= go_on(training, running, 1)
            ranks.gather(None)
        folder = Path(url) / "rank-0001"
        if rank == 1:
            if folder.exists():
                folder.rename(Path(url).parent / "aside")
            folder.write_text("in the way")
        ranks.gather(None)
        history |= go_on(training, running, 3)
        ranks.gather(None)
        seen = saved_steps(url)
        ranks.gather(None)
        if rank == 1:
            folder.unlink()
            if fail_from:
                (Path(url).parent / "aside").rename(folder)
        ranks.gather(None)
        history |= go_on(training, running, 2)
        return history, running.stats, seen


@pytest.mark.parametrize("fail_from", [0, 2])
def test_a_rank_whose_folder_takes_no_writes_holds_nobody_up(fail_from: int, tmp_path: Path) -> None:
    url = str(tmp_path / "scar")
    (history, good, seen), (_, bad, _) = run_ranks(with_a_file_in_the_way, 2, url, fail_from)
    assert (good.saves, good.failed_saves) == (fail_from + 5, 0)
    assert bad.failed_saves == 3
    # A fresh training counts when all have saved.
    assert set(seen.values()) == (set() if fail_from == 0 else {5})
    assert_made_of(load(url), history, url)
    assert set(saved_steps(url).values()) == {fail_from + 5}


def with_a_slow_rank(rank: int, url: str) -> Any:
    training, released, ranks = make_training(), threading.Event(), Ranks.of_default_group()
    with opened(url, fraction=1.0) as running:
        go_on(training, running, 1)
        commit = running.store.commit

        def slow(*args: Any) -> int:
            released.wait()
            return commit(*args)

        if rank == 1:
            running.store.commit = slow  # type: ignore[method-assign]
        done = []
        for _ in range(6):
            training.step()
            if rank == 0:
                training.save(running)
            elif training.begin(running):
                running.fence()
            done.append(training.steps)
        ranks.gather(None)
        steps = saved_steps(url)
        ranks.gather(None)
        released.set()
        return done, steps, running.stats


def test_a_slow_rank_skips_saves_and_holds_nobody_up(tmp_path: Path) -> None:
    url = str(tmp_path / "scar")
    (done, steps, good), (_, _, slow) = run_ranks(with_a_slow_rank, 2, url)
    assert done == [2, 3, 4, 5, 6, 7]
    assert set(steps.values()) == {1, 7}
    assert (good.saves, good.skipped_saves) == (7, 0)
    assert (slow.saves, slow.skipped_saves) == (3, 4)
    assert set(saved_steps(url).values()) == {3, 7}


def skips_and_saves_in_full(rank: int, url: str) -> Any:
    training, held, ranks = make_training(), threading.Event(), Ranks.of_default_group()
    with opened(url, fraction=0.5) as running:
        history = go_on(training, running, 3, full_at=3)
        ranks.gather(None)
        commit = running.store.commit
        if rank == 1:
            running.store.commit = lambda *args: held.wait() and commit(*args)  # type: ignore
        for _ in range(4):
            training.step()
            if training.begin(running):
                running.fence()
        ranks.gather(None)
        found = [load(url, consistent=True)]
        held.set()
        history |= go_on(training, running, 3, full_at=9)
        ranks.gather(None)
        found.append(load(url, consistent=True))
        return history, found, running.stats.skipped_saves


def test_a_skipped_save_of_one_rank_does_not_mix_steps_of_a_consistent_state(tmp_path: Path) -> None:
    (history, (first, second), _), (_, _, skipped) = run_ranks(skips_and_saves_in_full, 2, str(tmp_path / "scar"))
    assert skipped > 0
    assert_same(first, history[3])
    assert_same(second, history[9])


class HalfFrozen(nn.Module):
    """Which rank owns a row of ``late`` depends on whether there are moments of ``other``."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.zeros(1, 256), requires_grad=False)
        self.free = nn.Parameter(torch.zeros(64, 8))
        self.late = nn.Parameter(torch.zeros(64, 8), requires_grad=False)


def with_a_change_of_owners(rank: int, url: str) -> Any:
    from core_helpers import Training

    model, held, ranks = HalfFrozen(), threading.Event(), Ranks.of_default_group()
    training = Training(model, optim.Adam(model.parameters(), lr=0.01))
    with opened(url, fraction=1.0, block_size=160) as running:
        training.save(running)
        before = set(running._stager.bases.map.numbers)
        commit = running.store.commit
        if rank == 1:
            running.store.commit = lambda *args: held.wait() and commit(*args)  # type: ignore
        model.free.requires_grad_(True)
        for _ in range(6):
            training.steps += 1
            with torch.no_grad():
                model.free += 1
                model.late += 1
            if rank == 0:
                training.save(running)
            elif training.begin(running):
                running.fence()
        held.set()
        ranks.gather(None)
        running._writer.drain()
        ranks.gather(None)
        model.other.requires_grad_(True)
        training.step()
        with torch.no_grad():
            model.late += 1
        training.save(running)
        gained = set(running._stager.bases.map.numbers) - before
        return copied(training), len(gained), running.stats.skipped_saves


def test_a_block_that_changes_its_owner_is_newest_where_it_was_saved_last(tmp_path: Path) -> None:
    url = str(tmp_path / "scar")
    (live, gained, skipped), (_, gained_there, skipped_there) = run_ranks(with_a_change_of_owners, 2, url)
    assert skipped != skipped_there, "both have saved as often: it does not matter who counts"
    assert gained + gained_there, "no block changed its owner"
    assert_same(load(url), live)


# -- the directory -----------------------------------------------------------------------------------------------------


def opened_elsewhere(rank: int, urls: list[str], **settings: Any) -> None:
    opened(urls[rank], **settings).close()


def test_ranks_with_directories_of_their_own_are_told(tmp_path: Path) -> None:
    urls = [str(tmp_path / f"scar-{rank}") for rank in range(3)]
    failures = run_ranks(opened_elsewhere, 3, urls, failing=True)
    assert [failure.type for failure in failures] == ["StorageError"] * 3
    assert all("not the same directory on all ranks" in failure.message for failure in failures)
    assert not any((Path(url) / FILE).exists() for url in urls), "the lease was not given back"
    run_ranks(opened_elsewhere, 3, [urls[0]] * 3)


def test_a_directory_in_use_is_refused_on_all_ranks(tmp_path: Path) -> None:
    url = str(tmp_path / "scar")
    with RunningCheckpoint(url):
        failures = run_ranks(opened_elsewhere, 2, [url] * 2, failing=True)
    assert [failure.type for failure in failures] == ["DirectoryInUseError"] * 2
    run_ranks(opened_elsewhere, 2, [url] * 2)


def test_a_directory_with_something_else_in_it_is_refused_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_text("mine")
    failures = run_ranks(opened_elsewhere, 2, [str(tmp_path)] * 2, failing=True)
    assert [failure.type for failure in failures] == ["StorageError"] * 2
    assert not (tmp_path / FILE).exists()


def test_a_directory_that_cannot_be_made_is_an_error_on_all_ranks_if_asked_for(tmp_path: Path) -> None:
    (tmp_path / "scar").write_text("in the way")
    url = str(tmp_path / "scar" / "deeper")
    failures = run_ranks(opened_elsewhere, 2, [url] * 2, on_write_error="raise", failing=True)
    assert all(isinstance(failure, Failure) for failure in failures), failures
    assert {failure.type for failure in failures} <= {"NotADirectoryError", "FileExistsError", "OSError"}


def test_nothing_to_restore_is_said_on_all_ranks(tmp_path: Path) -> None:
    failures = run_ranks(recovered, 2, str(tmp_path / "scar"), False, failing=True)
    assert [failure.type for failure in failures] == ["NoCheckpointError"] * 2
