"""What is copied when, and what must not leak into a copy."""

import copy
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from core_helpers import Training, assert_same, drain, rows_of, saved_steps, steps_of, writes_held, written_blocks
from torch import Tensor, nn, optim

from lightning_scar.core import stager
from lightning_scar.core.bases import NEVER, Bases
from lightning_scar.core.restoration import load
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.selection import Candidates, distance
from lightning_scar.core.settings import Settings
from lightning_scar.core.skeletons import is_skeleton
from lightning_scar.storage.index import Located
from lightning_scar.storage.reading import Reading, fill
from lightning_scar.storage.store import DeltaStore


def training_of(width: int = 16) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width, bias=False), nn.BatchNorm1d(width), nn.Linear(width, 4, bias=False))
    training = Training(model, optim.Adam(model.parameters()))
    training.step()
    return training


def open_at_step_two(url: str, **settings: Any) -> tuple[RunningCheckpoint, Training]:
    """A running checkpoint whose first, full save is done, and its training one step later."""
    training = training_of()
    running = RunningCheckpoint(url, Settings(**{"fraction": 1.0, "block_size": 64, **settings}))
    training.save(running)
    training.step()
    training.model[1].running_mean += 1
    return running, training


@contextmanager
def staging_held() -> Iterator[threading.Event]:
    """Lazy staging that does not begin before the event is set: the next forward and backward run meanwhile."""
    event, stage_now = threading.Event(), stager.Stager._stage

    def late(self: stager.Stager, *args: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            event.wait()
        stage_now(self, *args)

    with patch.object(stager.Stager, "_stage", late):
        yield event
        event.set()


@pytest.mark.parametrize("staging", ["lazy", "eager"])
def test_what_changes_after_the_fence_does_not_leak(staging: Any, memory_url: str) -> None:
    running, training = open_at_step_two(memory_url, staging=staging)
    with running:
        training.begin(running)
        running.stage()
        running.fence()
        expected = copy.deepcopy(training.checkpoint())
        training.step()
        training.model[1].running_mean.fill_(-1)
    assert_same(load(memory_url), expected)


@pytest.mark.parametrize("staging", ["lazy", "eager"])
def test_what_changes_right_after_an_explicit_save_does_not_leak(staging: Any, memory_url: str) -> None:
    running, training = open_at_step_two(memory_url, staging=staging)
    with running:
        expected = copy.deepcopy(training.checkpoint())
        training.save(running)
        training.step()
        training.step()
    assert_same(load(memory_url), expected)


def test_what_changes_right_after_eager_staging_does_not_leak(memory_url: str) -> None:
    running, training = open_at_step_two(memory_url, staging="eager")
    with running:
        training.begin(running)
        running.stage()
        expected = copy.deepcopy(training.checkpoint())
        training.step()
    assert_same(load(memory_url), expected)


def test_what_changes_between_save_and_stage_belongs_to_the_save(memory_url: str) -> None:
    running, training = open_at_step_two(memory_url)
    with running:
        training.begin(running)
        with torch.no_grad():
            training.model[0].weight.clamp_(-0.1, 0.1)
        running.stage()
    assert torch.equal(load(memory_url)["state_dict"]["0.weight"], training.model[0].weight)


def test_lazy_staging_really_reads_after_stage_has_returned(memory_url: str) -> None:
    running, training = open_at_step_two(memory_url)
    with running, staging_held() as go:
        training.begin(running)
        started = time.monotonic()
        running.stage()
        assert time.monotonic() - started < 5
        assert running.stats.saves == 1
        go.set()
        running.fence()
        assert running.stats.saves == 2


def test_buffers_are_copied_before_the_next_forward_changes_them(memory_url: str) -> None:
    running, training = open_at_step_two(memory_url)
    with running, staging_held() as go:
        training.begin(running)
        running.stage()
        expected = copy.deepcopy(training.checkpoint())
        training.model.train()(torch.randn(4, 8))
        go.set()
    assert_same(load(memory_url), expected)


def test_the_skeleton_is_of_the_moment_of_the_save(memory_url: str) -> None:
    running, training = open_at_step_two(memory_url)
    with running:
        counters = {"batches": [1]}
        checkpoint = {**training.checkpoint(), "loops": counters}
        running.save(checkpoint, 2)
        counters["batches"][0] = 99
        checkpoint["global_step"] = 99
    assert load(memory_url)["loops"] == {"batches": [1]}
    assert load(memory_url)["global_step"] == 2


# -- tensors that change behind the fence's back ---------------------------------------------------------------------


@pytest.mark.parametrize("slot", ["param", "exp_avg"])
def test_a_tensor_caught_changing_is_left_out_of_that_save(slot: str, memory_url: str) -> None:
    running, training = open_at_step_two(memory_url)
    first = copy.deepcopy(load(memory_url))
    weight = training.model[0].weight
    with running, staging_held() as go:
        training.begin(running)
        running.stage()
        with torch.no_grad():
            (weight if slot == "param" else training.optimizers[0].state[weight][slot]).mul_(2)
        go.set()
        running.fence()
        drain(running)
        assert set(steps_of(memory_url, "0.weight")) == {1}
        assert set(steps_of(memory_url, "2.weight")) == set(steps_of(memory_url, "1.running_mean")) == {2}
        assert torch.equal(load(memory_url)["state_dict"]["0.weight"], first["state_dict"]["0.weight"])


def test_a_tensor_caught_changing_is_copied_at_once_from_then_on(memory_url: str) -> None:
    running, training = open_at_step_two(memory_url)
    with running:
        for _ in range(2):
            with staging_held() as go:
                training.begin(running)
                running.stage()
                expected = training.model[0].weight.detach().clone()
                with torch.no_grad():
                    training.model[0].weight.mul_(2)
                go.set()
                running.fence()
            training.step()
    assert set(steps_of(memory_url, "0.weight")) == {3}
    assert torch.equal(load(memory_url)["state_dict"]["0.weight"], expected)


def test_what_was_caught_is_saved_next_time_even_if_it_rests_from_then_on(memory_url: str) -> None:
    running, training = open_at_step_two(memory_url)
    with running:
        with staging_held() as go:
            training.begin(running)
            running.stage()
            with torch.no_grad():
                training.model[0].weight.zero_()
            go.set()
            running.fence()
        training.save(running)
        assert_same(load(memory_url), training.checkpoint())


def test_what_was_caught_is_not_taken_for_the_older_copy_that_the_writer_finishes_meanwhile(memory_url: str) -> None:
    running, training = open_at_step_two(memory_url)
    with running:
        with writes_held(running), staging_held() as go:
            go.set()
            training.begin(running)
            running.fence()
            go.clear()
            training.step()
            training.begin(running)
            running.stage()
            with torch.no_grad():
                training.model[0].weight.zero_()
            go.set()
            running.fence()
        drain(running)
        training.steps += 1
        training.save(running)
        assert_same(load(memory_url), training.checkpoint())


def test_a_renormalising_embedding_is_never_torn(memory_url: str) -> None:
    model = nn.Embedding(64, 8, max_norm=0.5)
    training = Training(model, optim.SGD(model.parameters(), lr=0.1))
    history = {}
    with RunningCheckpoint(memory_url, Settings(fraction=1.0, block_size=32)) as running:
        for _ in range(6):
            training.step()
            training.begin(running)
            running.stage()
            history[training.steps] = model.weight.detach().clone()
            model(torch.randint(0, 64, (16,)))
            running.fence()
    loaded = load(memory_url)["state_dict"]["weight"]
    for key, step in saved_steps(memory_url).items():
        row = int(key.rpartition("[")[2].split(":")[0])
        assert torch.equal(loaded[row], history[step][row]), key


# -- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staging", ["lazy", "eager"])
@pytest.mark.parametrize(
    ("fraction", "refresh"), [(0.1, None), (0.25, None), (0.6, None), (0.25, "auto"), (0.6, "auto")]
)
def test_a_partial_save_stays_within_its_fraction(staging: Any, fraction: float, refresh: Any, memory_url: str) -> None:
    training = training_of(width=64)
    settings = Settings(fraction=fraction, block_size=256, staging=staging, refresh=refresh)
    with RunningCheckpoint(memory_url, settings) as running:
        training.save(running)
        total = running._stager.bases.map.state_bytes
        for _ in range(5):
            training.step()
            training.model[1].running_mean += 1
            training.save(running)
            delta = max(running.store.deltas, key=lambda delta: delta.head.sequence)
            skeletons = sum(block.nbytes for block in delta.blocks if is_skeleton(block.key))
            written = delta.block_bytes - skeletons + delta.refresh_bytes
            assert 0.5 * fraction * total <= written <= fraction * total
            assert (delta.refresh_bytes > 0) == (refresh == "auto")


def test_small_buffers_are_always_fresh(memory_url: str) -> None:
    training = training_of(width=64)
    with RunningCheckpoint(memory_url, Settings(fraction=0.1, block_size=64, refresh=None)) as running:
        for _ in range(5):
            training.step()
            training.model[1].running_mean += 1e-6
            training.save(running)
    assert steps_of(memory_url, "1.running_mean") == [training.steps] * len(steps_of(memory_url, "1.running_mean"))


# -- what is chosen --------------------------------------------------------------------------------------------------


class Saved:
    """Two parameters of four rows, saved at step 1 in blocks of one row, and their save at step 5."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.a, self.b = torch.zeros(4, 2), torch.zeros(4, 2)
        self.running = RunningCheckpoint(url, Settings(**{"fraction": 0.25, "block_size": 8, **settings}))
        self.url = url
        self.save(1)

    @property
    def bases(self) -> Bases:
        return self.running._stager.bases

    def save(self, step: int, full: bool = False) -> None:
        checkpoint = {"a": self.a, "b": self.b}
        self.running.save_now({"state_dict": checkpoint}, step, parameters=checkpoint.values(), full=full)
        drain(self.running)

    def written(self) -> list[str]:
        """What a save at step 5 writes, in the order of the state."""
        self.save(5)
        return sorted(key.removeprefix("state_dict/") for key in written_blocks(self.url, 5))


def test_within_a_budget_the_furthest_are_chosen_and_the_rest_is_reported(memory_url: str) -> None:
    saved = Saved(memory_url, fraction=1 / 8)
    saved.a[0], saved.a[1, 0], saved.b[2, 0] = 5.0, 3.0, 4.0
    with saved.running:
        assert saved.written() == ["a[0:1]"]
        assert saved.running.stats.distance == 5.0
        assert saved.running.stats.oldest_age == 4


def test_nothing_is_written_of_what_did_not_change(memory_url: str) -> None:
    saved = Saved(memory_url)
    saved.a[2] += 1
    with saved.running:
        assert saved.written() == ["a[2:3]"]
        assert (saved.running.stats.distance, saved.running.stats.oldest_age) == (0.0, 0)


def test_a_budget_smaller_than_a_block_still_buys_one(memory_url: str) -> None:
    saved = Saved(memory_url, fraction=1e-6)
    saved.a += 1
    with saved.running:
        assert len(saved.written()) == 1


def test_blocks_that_were_never_saved_are_chosen_beyond_any_budget(memory_url: str) -> None:
    saved = Saved(memory_url, fraction=1e-6)
    with saved.running:
        saved.bases.forget(torch.tensor([2, 4]))
        saved.a += 1
        assert saved.bases.steps[2] == NEVER
        assert {"a[2:3]", "b[0:1]"} <= set(saved.written())


def test_a_failed_write_is_infinitely_far_until_it_is_on_disk(memory_url: str) -> None:
    saved = Saved(memory_url, fraction=1 / 8)
    with saved.running:
        saved.a[0] = 1e6
        saved.bases.fail(torch.tensor([5]))
        assert saved.written() == ["b[1:2]"]
        assert saved.running.stats.distance == pytest.approx(2**0.5 * 1e6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.filterwarnings("ignore:lightning-scar")
def test_a_non_finite_block_is_counted_and_never_chosen(bad: float, failed: bool, memory_url: str) -> None:
    saved = Saved(memory_url, fraction=0.9)
    with saved.running:
        saved.a[0], saved.a[1, 1] = 1.0, bad
        if failed:
            saved.bases.fail(torch.tensor([1]))
        assert saved.written() == ["a[0:1]"]
        assert saved.running.stats.non_finite_blocks == 1
        assert saved.running.stats.distance == 0


def test_differences_that_are_tiny_are_noticed(memory_url: str) -> None:
    saved = Saved(memory_url)
    with saved.running:
        saved.b[0] = 1e-30
        assert saved.written() == ["b[0:1]"]


def test_who_saves_everything_saves_minus_zeros_too(memory_url: str) -> None:
    saved = Saved(memory_url, fraction=1.0)
    with saved.running:
        saved.a[3].neg_()
        assert len(saved.written()) == 8
    assert_same(load(memory_url)["state_dict"], {"a": saved.a, "b": saved.b})


def test_the_policy_sees_distance_bytes_age_and_step_of_the_blocks_that_changed(memory_url: str) -> None:
    seen: list[Candidates] = []

    def watched(candidates: Candidates) -> Tensor:
        seen.append(candidates)
        return distance(candidates)

    saved = Saved(memory_url, policy=watched)
    with saved.running:
        saved.a[1, 0], saved.b[2, 1] = 3.0, -4.0
        saved.written()
    candidates = seen[-1]
    assert candidates.distance.tolist() == [3.0, 4.0]
    assert candidates.nbytes.tolist() == [8, 8]
    assert candidates.age.tolist() == [4, 4]
    assert candidates.step == 5
    assert candidates.preconditioner.tolist() == [1.0, 1.0]


def test_overdue_blocks_come_first(memory_url: str) -> None:
    for max_age, expected in ((None, "a[0:1]"), (3, "b[2:3]")):
        saved = Saved(f"{memory_url}/{max_age}", fraction=1 / 8, max_age=max_age)
        with saved.running:
            for row in range(4):
                saved.a[row] += 1
                saved.save(2)
            saved.a[0] += 100
            saved.b[2] += 1e-3
            assert saved.written() == [expected]


# -- threads ---------------------------------------------------------------------------------------------------------


def test_the_number_of_threads_of_torch_is_left_alone_here_and_in_later_threads(memory_url: str) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        running, training = open_at_step_two(memory_url)
        with running:
            training.save(running)
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_users_policy_reaches_the_caller_and_saving_goes_on(memory_url: str) -> None:
    mistakes = [True]

    def mistaken(candidates: Candidates) -> Tensor:
        return torch.ones(3, 3) if mistakes else candidates.distance

    running, training = open_at_step_two(memory_url, policy=mistaken)
    with running:
        training.begin(running)
        with pytest.raises(ValueError, match=r"mistaken.*one priority per block"):
            running.fence()
        mistakes.clear()
        training.step()
        training.save(running)
        assert_same(load(memory_url), training.checkpoint())


def test_a_save_that_was_called_off_leaves_the_memory_of_the_one_in_the_queue_alone(memory_url: str) -> None:
    mistakes: list[bool] = []

    def mistaken(candidates: Candidates) -> Tensor:
        return torch.ones(3, 3) if mistakes else candidates.distance

    running, training = open_at_step_two(memory_url, fraction=0.9, policy=mistaken, refresh=None)
    history = {}
    with running:
        with writes_held(running):
            for turn in range(3):
                training.step()
                history[training.steps] = copy.deepcopy(training.checkpoint())
                mistakes[:] = [True] * (turn == 1)
                training.begin(running, wait=True)
                if turn == 1:
                    with pytest.raises(ValueError, match="one priority per block"):
                        running.fence()
                else:
                    running.fence()
        drain(running)
    store = DeltaStore(memory_url)
    store.refresh()
    for delta in store.deltas:
        assert not fill([Reading(Located(delta, block), block.new_memory) for block in delta.blocks])
    loaded, steps = load(memory_url)["state_dict"], saved_steps(memory_url)
    for key, step in steps.items():
        name, rows = key.removeprefix("state_dict/").rpartition("[")[0], rows_of(key)
        if step in history and key.startswith("state_dict/"):
            assert torch.equal(loaded[name][rows], history[step]["state_dict"][name][rows]), key
