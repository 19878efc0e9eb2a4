"""What is copied when, and what must not leak into a copy."""

import copy
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from core_helpers import Training, assert_same, drain, saved_steps, steps_of, writes_held, written_blocks
from torch import Tensor, nn, optim

from lightning_scar.core import stager
from lightning_scar.core.last_saved import LastSaved
from lightning_scar.core.restoration import load
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.selection import Candidates
from lightning_scar.core.settings import Settings


def training_of(width: int = 16) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width, bias=False), nn.BatchNorm1d(width), nn.Linear(width, 4, bias=False))
    training = Training(model, optim.Adam(model.parameters()))
    training.step()
    return training


def open_at_step_two(url: str, **settings: Any) -> tuple[RunningCheckpoint, Training]:
    """A running checkpoint whose first, full save is done, and its training one step later."""
    training = training_of()
    running = RunningCheckpoint(url, Settings(fraction=1.0, block_size=64, **settings))
    training.save(running)
    training.step()
    training.model[1].running_mean += 1
    return running, training


@contextmanager
def staging_held() -> Iterator[threading.Event]:
    """Lazy staging that does not begin before the event is set: the next forward and backward run meanwhile."""
    event, stage_now = threading.Event(), stager.Stager._copy

    def late(self: stager.Stager, *args: Any) -> int:
        if threading.current_thread() is not threading.main_thread():
            event.wait()
        return stage_now(self, *args)

    with patch.object(stager.Stager, "_copy", late):
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
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.6])
def test_a_partial_save_stays_within_its_fraction(staging: Any, fraction: float, memory_url: str) -> None:
    training = training_of(width=64)
    with RunningCheckpoint(memory_url, Settings(fraction=fraction, block_size=64, staging=staging)) as running:
        training.save(running)
        sizes = dict(zip(running._stager.last.map.numbers, running._stager.last.map.nbytes.tolist(), strict=True))
        for _ in range(5):
            training.step()
            training.model[1].running_mean += 1
            training.save(running)
            written = sum(sizes[key] for key in written_blocks(memory_url, training.steps))
            assert 0.5 * fraction * sum(sizes.values()) <= written <= fraction * sum(sizes.values())


def test_small_buffers_are_always_fresh(memory_url: str) -> None:
    training = training_of(width=64)
    with RunningCheckpoint(memory_url, Settings(fraction=0.1, block_size=64)) as running:
        for _ in range(5):
            training.step()
            training.model[1].running_mean += 1e-6
            training.save(running)
    assert steps_of(memory_url, "1.running_mean") == [training.steps] * len(steps_of(memory_url, "1.running_mean"))


# -- threads ---------------------------------------------------------------------------------------------------------


def test_the_state_may_change_while_the_last_save_is_still_being_noted(memory_url: str) -> None:
    record, fit, noting = LastSaved.record, LastSaved.fit, threading.Event()

    def slow_record(self: LastSaved, *args: Any) -> None:
        noting.set()
        time.sleep(0.02)
        record(self, *args)
        noting.clear()

    def checked_fit(self: LastSaved, *args: Any) -> None:
        assert not noting.is_set()
        fit(self, *args)

    model = nn.Linear(4, 4)
    training = Training(model, optim.Adam(model.parameters()))
    with (
        patch.object(LastSaved, "record", slow_record),
        patch.object(LastSaved, "fit", checked_fit),
        RunningCheckpoint(memory_url, Settings(fraction=1.0)) as running,
    ):
        for _ in range(3):
            running.save_now(training.checkpoint(), training.steps)
            assert noting.wait(5)
            training.step()
            model.register_buffer(f"buffer{training.steps}", torch.ones(3))
        running.save_now(training.checkpoint(), training.steps)
    assert_same(load(memory_url), training.checkpoint())


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
        with pytest.raises(ValueError, match=r"mistaken.*one priority a block"):
            running.fence()
        mistakes.clear()
        training.step()
        training.save(running)
        assert_same(load(memory_url), training.checkpoint())
