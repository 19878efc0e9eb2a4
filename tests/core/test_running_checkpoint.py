"""What a save writes, and what it leaves alone."""

import copy
import math
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from core_helpers import (
    Training,
    assert_same,
    drain,
    rows_of,
    save_tensors,
    saved_steps,
    steps_of,
    writes_held,
    written_blocks,
)
from torch import Tensor, nn, optim

from lightning_scar.core.restoration import IncompleteError, load
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.selection import Candidates
from lightning_scar.core.settings import Settings
from lightning_scar.storage.delta import StorageError
from lightning_scar.storage.lease import DirectoryInUseError


def opened(url: str | Path, **settings: Any) -> RunningCheckpoint:
    return RunningCheckpoint(url, Settings(**{"fraction": 1.0, "block_size": 16, **settings}))


def linear_training(**options: Any) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 4))
    return Training(model, optim.Adam(model.parameters(), **options))


# -- partial saves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["distance", "round_robin", "random"])
@pytest.mark.parametrize("staging", ["lazy", "eager"])
def test_a_partial_save_holds_live_values_where_it_wrote_and_older_ones_elsewhere(
    policy: Any, staging: Any, memory_url: str
) -> None:
    training = linear_training()
    history = {}
    with opened(memory_url, fraction=0.3, policy=policy, staging=staging, refresh=None) as running:
        for _ in range(6):
            training.step()
            history[training.steps] = copy.deepcopy(training.checkpoint())
            training.save(running)
    loaded, steps = load(memory_url), saved_steps(memory_url)
    assert len(set(steps.values())) > 1
    assert loaded["global_step"] == training.steps
    for i, name in enumerate(training.model.state_dict()):
        for key, step in steps.items():
            if key.startswith(f"state_dict/{name}["):
                lived, part = history[step], rows_of(key)
                assert torch.equal(loaded["state_dict"][name][part], lived["state_dict"][name][part])
                for moment in ("exp_avg", "exp_avg_sq"):
                    found, expected = (c["optimizer_states"][0]["state"][i][moment] for c in (loaded, lived))
                    assert torch.equal(found[part], expected[part])


def test_the_first_save_is_full_and_the_later_ones_are_partial(memory_url: str) -> None:
    training = linear_training()
    training.step()
    with opened(memory_url, fraction=0.2) as running:
        training.save(running)
        assert len(written_blocks(memory_url, 1)) == len(running._stager.bases.map)
        training.step()
        training.save(running)
        assert 0 < len(written_blocks(memory_url, 2)) < len(running._stager.bases.map)
        assert (running.stats.saves, running.stats.full_saves) == (2, 1)


def test_a_full_save_writes_all_that_changed(memory_url: str) -> None:
    training = linear_training()
    with opened(memory_url, fraction=0.1) as running:
        training.save(running)
        training.step()
        training.save(running, full=True)
        assert running.stats.full_saves == 2
    assert_same(load(memory_url), training.checkpoint())


def test_priority_saves_bring_the_copy_closer_than_random_ones(memory_url: str) -> None:
    left = {}
    for policy in ("distance", "random"):
        x = torch.zeros(64, 4)
        with opened(f"{memory_url}/{policy}", policy=policy, fraction=0.25) as running:
            save_tensors(running, 1, x=x)
            x += torch.randn(64, 1, generator=torch.Generator().manual_seed(0)).exp()
            save_tensors(running, 2, x=x)
            left[policy] = running.stats.distance
            true_distance = (load(f"{memory_url}/{policy}")["state_dict"]["x"] - x).norm().item()
            assert running.stats.distance == pytest.approx(true_distance, rel=1e-5)
    assert left["distance"] < 0.8 * left["random"]


def test_the_oldest_age_is_that_of_the_oldest_block_that_has_changed(memory_url: str) -> None:
    x, frozen = torch.zeros(8, 4), torch.zeros(8, 4)
    with opened(memory_url, fraction=1 / 16) as running:
        for step in (10, 13, 17):
            save_tensors(running, step, x=x, frozen=frozen)
            x[:3] += 1
    assert running.stats.oldest_age == 7


def test_max_age_lets_no_block_starve(memory_url: str) -> None:
    x = torch.zeros(8, 4)
    with opened(memory_url, fraction=1 / 4, max_age=5) as running:
        for step in range(1, 30):
            save_tensors(running, step, x=x)
            x[:4] += 100
            x[4:] += 1e-3
            assert step - min(steps_of(memory_url, "x")) <= 5 + 4


def test_bytes_and_saves_are_counted(tmp_path: Path) -> None:
    with opened(tmp_path) as running:
        save_tensors(running, 1, x=torch.zeros(8))
        save_tensors(running, 5, x=torch.ones(8))
    files = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert running.stats.bytes_written == files
    assert running.stats.step == 5
    assert running.stats.stall_seconds > 0
    assert running.stats.full_stall_seconds > 0


def test_small_facts_travel_with_the_delta(memory_url: str) -> None:
    with opened(memory_url) as running:
        running.save_now({"x": torch.ones(2)}, 3, info={"finished": True, "epoch": 2})
        drain(running)
        [delta] = running.store.deltas
    assert delta.head.info["finished"] is True
    assert (delta.head.info["epoch"], delta.head.step) == (2, 3)


# -- frozen, resting and new state -----------------------------------------------------------------------------------


def test_frozen_parameters_are_never_rewritten_after_the_first_save(memory_url: str) -> None:
    training = linear_training()
    training.step()
    training.model[0].requires_grad_(False)
    never_trained = nn.Linear(4, 4).requires_grad_(False)
    training.model.append(never_trained)
    with opened(memory_url) as running:
        for _ in range(4):
            training.step()
            training.model[0].zero_grad()
            training.save(running)
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert set(steps_of(memory_url, name)) == {2}, name
    assert set(steps_of(memory_url, "1.weight")) == {5}
    assert_same(load(memory_url), training.checkpoint())


def test_frozen_parameters_are_not_rewritten_while_the_first_save_is_still_in_the_queue(memory_url: str) -> None:
    training = linear_training()
    training.model[0].requires_grad_(False)
    training.step()
    with opened(memory_url) as running:
        with writes_held(running):
            for _ in range(2):
                assert training.begin(running)
                running.fence()
                training.step()
        drain(running)
        assert set(steps_of(memory_url, "1.weight")) == {2}
        assert set(steps_of(memory_url, "0.weight")) == {1}


def test_moments_that_move_while_the_writer_is_behind_are_written_when_it_has_caught_up(memory_url: str) -> None:
    training = linear_training(lr=0.0)
    training.step()
    with opened(memory_url) as running:
        with writes_held(running):
            for _ in range(2):
                assert training.begin(running)
                running.fence()
                training.step()
        drain(running)
        training.save(running)
    assert_same(load(memory_url), training.checkpoint())


def test_a_full_save_is_complete_even_while_the_writer_is_behind(memory_url: str) -> None:
    training = linear_training(lr=0.0)
    training.step()
    with opened(memory_url) as running, writes_held(running):
        training.begin(running)
        running.fence()
        training.step()
        training.begin(running, full=True)
        running.fence()
    assert_same(load(memory_url, consistent=True), training.checkpoint())


class Averaged(Training):
    """A student, and a teacher that no optimizer trains."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = nn.ModuleDict({"student": nn.Linear(4, 16), "teacher": nn.Linear(4, 16), "rests": nn.Linear(4, 4)})
        for name in ("teacher", "rests"):
            model[name].requires_grad_(False)
        super().__init__(model, optim.Adam(model["student"].parameters(), lr=0.1))

    def average(self, past_the_counter: bool) -> None:
        for mean, now in zip(self.model["teacher"].parameters(), self.model["student"].parameters(), strict=True):
            if past_the_counter:
                mean.data.mul_(0.9).add_(now.data, alpha=0.1)
            else:
                mean.mul_(0.9).add_(now.detach(), alpha=0.1)


@pytest.mark.parametrize("past_the_counter", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_teacher_that_follows_its_student_is_saved_whatever_requires_grad_says(
    past_the_counter: bool, fraction: float, memory_url: str
) -> None:
    training = Averaged()
    training.step()
    with opened(memory_url, fraction=fraction) as running:
        for _ in range(6):
            training.save(running)
            training.step()
            training.average(past_the_counter)
        training.save(running)
        if fraction < 1:
            loaded, now = load(memory_url)["state_dict"], training.checkpoint()["state_dict"]
            for name in ("teacher.weight", "student.weight"):
                assert float((loaded[name] - now[name]).norm()) < 0.5, "not far behind"
        training.save(running, full=True)
    assert_same(load(memory_url), training.checkpoint())
    assert set(steps_of(memory_url, "rests.weight")) == {1}
    assert set(steps_of(memory_url, "teacher.weight")) == {training.steps}


def test_a_frozen_tensor_that_moves_once_is_written_once_more(memory_url: str) -> None:
    training = Averaged()
    training.step()
    with opened(memory_url) as running:
        for step in range(5):
            training.save(running)
            training.step()
            if step == 1:
                training.model["teacher"].weight.data.add_(1)
    assert set(steps_of(memory_url, "teacher.weight")) == {3}
    assert set(steps_of(memory_url, "teacher.bias")) == {1}
    expected = training.model["teacher"].weight
    assert torch.equal(load(memory_url)["state_dict"]["teacher.weight"], expected)


def test_moments_that_move_while_the_parameter_rests_are_written(memory_url: str) -> None:
    training = linear_training(lr=0.0)
    training.step()
    with opened(memory_url) as running:
        for _ in range(3):
            training.save(running)
            training.step()
        training.save(running)
    assert set(saved_steps(memory_url).values()) == {4}
    assert_same(load(memory_url), training.checkpoint())


def test_in_a_warm_up_at_rate_zero_the_oldest_blocks_go_first(memory_url: str) -> None:
    training = linear_training(lr=0.0)
    training.step()
    with opened(memory_url, fraction=0.3, refresh=None) as running:
        for _ in range(6):
            training.save(running)
            training.step()
    assert min(saved_steps(memory_url).values()) > 1


def test_optimizer_state_that_appears_late_is_saved_at_once(memory_url: str) -> None:
    training = linear_training()
    with opened(memory_url, fraction=0.05) as running:
        training.save(running)
        training.step()
        training.save(running)
        assert_same(load(memory_url), training.checkpoint())


def test_a_parameter_that_is_added_later_is_saved_at_once_and_the_others_keep_their_versions(memory_url: str) -> None:
    training = linear_training()
    training.step()
    with opened(memory_url, fraction=0.2, refresh=None) as running:
        training.save(running)
        adapter = nn.Parameter(torch.ones(3, 4))
        training.model.register_parameter("adapter", adapter)
        training.optimizers[0].add_param_group({"params": [adapter]})
        training.steps = 2
        training.save(running)
    assert set(steps_of(memory_url, "adapter")) == {2}
    assert 1 in steps_of(memory_url, "0.weight")
    assert_same(load(memory_url), training.checkpoint())


def test_another_order_of_the_optimizer_keeps_the_names_of_its_state(memory_url: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False))
    first = Training(model, optim.Adafactor([model[0].weight, model[1].weight]))
    first.step()
    with opened(memory_url) as running:
        first.save(running)
        before = set(saved_steps(memory_url))
        second = Training(model, optim.Adafactor([model[1].weight, model[0].weight]))
        second.steps = 1
        second.step()
        second.save(running)
        assert set(saved_steps(memory_url)) == before
    assert_same(load(memory_url), second.checkpoint())


def test_a_tensor_that_is_replaced_by_another_object_is_followed(memory_url: str) -> None:
    with opened(memory_url) as running:
        for step in (1, 2, 3):
            x = torch.full((4, 4), float(step))
            save_tensors(running, step, x=x)
    assert load(memory_url)["state_dict"]["x"].unique().tolist() == [3.0]


def test_a_tensor_that_is_gone_is_not_loaded_any_more(memory_url: str) -> None:
    with opened(memory_url) as running:
        save_tensors(running, 1, x=torch.zeros(4), y=torch.zeros(4))
        save_tensors(running, 2, y=torch.ones(4))
    assert list(load(memory_url)["state_dict"]) == ["y"]


@pytest.mark.parametrize("changed", [torch.ones(7, 4), torch.ones(5, 4, dtype=torch.float64)], ids=["shape", "dtype"])
def test_a_tensor_of_another_shape_or_dtype_is_saved_anew(changed: Tensor, memory_url: str) -> None:
    with opened(memory_url, fraction=0.1) as running:
        save_tensors(running, 1, x=torch.zeros(5, 4), y=torch.zeros(50, 4))
        save_tensors(running, 2, x=changed, y=torch.ones(50, 4))
    assert_same(load(memory_url)["state_dict"]["x"], changed)


def test_a_checkpoint_without_large_tensors_is_saved_too(memory_url: str) -> None:
    with opened(memory_url) as running:
        running.save_now({"global_step": 1}, 1)
        running.save_now({"global_step": 2, "rng": torch.get_rng_state()}, 2)
    assert load(memory_url)["global_step"] == 2


# -- NaN and Inf -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("full", [False, True])
def test_a_non_finite_block_is_not_written_over_a_good_version(bad: float, full: bool, memory_url: str) -> None:
    x = torch.zeros(4, 4)
    with opened(memory_url) as running:
        save_tensors(running, 1, x=x)
        x += 1
        x[2, 1] = bad
        with pytest.warns(UserWarning, match="1 blocks hold NaN or Inf at step 2"):
            running.save_now({"state_dict": {"x": x}}, 2, full=full)
        assert running.stats.non_finite_blocks == 1
    assert steps_of(memory_url, "x") == [2, 2, 1, 2]
    assert load(memory_url)["state_dict"]["x"][:, 0].tolist() == [1, 1, 0, 1]


def test_non_finite_optimizer_state_is_not_written_over_a_good_version(memory_url: str) -> None:
    training = linear_training()
    training.step()
    weight = training.model[0].weight
    with opened(memory_url) as running:
        training.save(running)
        good = weight[3].detach().clone()
        training.step()
        training.optimizers[0].state[weight]["exp_avg"][3, 0] = math.nan

        def save_and_close() -> None:
            training.save(running)
            running.close()

        # The writer finds it: the save tells if the writer is quick, else the end does.
        with pytest.warns(UserWarning, match="1 blocks hold NaN or Inf"):
            save_and_close()
        assert running.stats.non_finite_blocks == 1
    assert [key for key, step in saved_steps(memory_url).items() if step == 1] == ["state_dict/0.weight[3:4]"]
    assert torch.equal(load(memory_url)["state_dict"]["0.weight"][3], good)


def test_the_warning_comes_once_and_the_count_goes_back_to_zero(memory_url: str) -> None:
    x = torch.zeros(4, 4)
    with opened(memory_url) as running, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, value in enumerate([0.0, math.nan, math.nan, 2.0], start=1):
            x.fill_(value)
            save_tensors(running, step, x=x)
        assert running.stats.non_finite_blocks == 0
    assert len([w for w in caught if "NaN" in str(w.message)]) == 1
    assert steps_of(memory_url, "x") == [4, 4, 4, 4]


def test_what_was_never_finite_is_saved_as_it_is(memory_url: str) -> None:
    x = torch.full((2, 4), math.nan)
    with opened(memory_url) as running:
        save_tensors(running, 1, x=x)
        assert running.stats.non_finite_blocks == 0
    assert_same(load(memory_url)["state_dict"]["x"], x)


@pytest.mark.parametrize("writer_is_behind", [False, True])
def test_a_causal_mask_is_saved_and_does_not_count_as_damage(writer_is_behind: bool, memory_url: str) -> None:
    mask, x = torch.full((4, 4), -math.inf).triu(1), torch.zeros(4, 4)
    with opened(memory_url) as running, warnings.catch_warnings():
        warnings.simplefilter("error")
        with writes_held(running) if writer_is_behind else nullcontext():
            for step in (1, 2):
                running.save_now({"state_dict": {"mask": mask, "x": x}}, step)
                if not writer_is_behind:
                    drain(running)
                x += 1
        drain(running)
        assert running.stats.non_finite_blocks == 0
        mask[1, 0] = 7.0
        save_tensors(running, 3, mask=mask, x=x)
        assert running.stats.non_finite_blocks == 0
    assert_same(load(memory_url)["state_dict"], {"mask": mask, "x": x})


def test_a_run_that_is_lost_to_nan_as_its_optimizer_state_appears_leaves_a_whole_checkpoint(memory_url: str) -> None:
    training = linear_training()
    with opened(memory_url) as running:
        training.save(running)
        training.step()
        with torch.no_grad():
            training.model[0].weight.fill_(math.nan)
        training.save(running)
    assert load(memory_url)["global_step"] in (0, 1)


def test_a_full_save_with_non_finite_blocks_is_no_consistent_state(memory_url: str) -> None:
    x = torch.zeros(4, 4)
    with opened(memory_url) as running, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_tensors(running, 1, x=x)
        x += 1
        x[0, 0] = math.nan
        running.save_now({"state_dict": {"x": x}}, 2, full=True)
    assert load(memory_url, consistent=True)["state_dict"]["x"].unique().tolist() == [0.0]


# -- the writer ------------------------------------------------------------------------------------------------------


def test_a_partial_save_is_skipped_and_counted_when_the_writer_is_behind(memory_url: str) -> None:
    x = torch.zeros(4, 4)
    with opened(memory_url) as running:
        with writes_held(running):
            started = []
            for step in range(1, 6):
                x += 1
                started.append(running.save({"state_dict": {"x": x}}, step))
                running.fence()
            assert started == [True, True, False, False, False]
            assert (running.stats.saves, running.stats.skipped_saves) == (2, 3)
            assert running.stats.queue_depth == 2
        drain(running)
        assert load(memory_url)["state_dict"]["x"].unique().tolist() == [2.0]
        save_tensors(running, 6, x=x)
    assert load(memory_url)["state_dict"]["x"].unique().tolist() == [5.0]


@pytest.mark.parametrize("options", [{"full": True}, {"wait": True}], ids=str)
def test_a_full_save_and_an_explicit_one_wait_for_the_writer(options: dict[str, bool], memory_url: str) -> None:
    x = torch.zeros(4, 4)
    with opened(memory_url) as running:
        commit = running.store.commit
        written = []

        def slow(*args: Any) -> int:
            time.sleep(0.01)
            written.append(args[0].step)
            return commit(*args)

        running.store.commit = slow
        for step in range(1, 7):
            x += 1
            assert running.save({"state_dict": {"x": x}}, step, **options)
            running.fence()
    assert written == [1, 2, 3, 4, 5, 6]
    assert running.stats.skipped_saves == 0
    assert load(memory_url)["state_dict"]["x"].unique().tolist() == [6.0]


def test_live_tensors_may_move_on_while_copies_wait_in_the_queue(memory_url: str) -> None:
    x = torch.zeros(4, 4)
    with opened(memory_url) as running:
        with writes_held(running):
            for step in (1, 2):
                x += 1
                running.save_now({"state_dict": {"x": x}}, step)
            x.fill_(99)
        drain(running)
        assert load(memory_url)["state_dict"]["x"].unique().tolist() == [2.0]


def test_staging_memory_is_not_reused_before_it_is_written(memory_url: str) -> None:
    x = torch.zeros(64, 4)
    with opened(memory_url) as running:
        save_tensors(running, 0, x=x)
        for step in range(1, 40):
            x.fill_(step)
            running.save_now({"state_dict": {"x": x}}, step)
            if step % 5 == 0:
                drain(running)
                assert load(memory_url)["state_dict"]["x"].unique().tolist() == [step]


def test_closing_finishes_what_is_under_way(memory_url: str) -> None:
    running = opened(memory_url)
    running.save({"x": torch.ones(4)}, 1)
    running.close()
    running.close()
    assert load(memory_url)["x"].tolist() == [1, 1, 1, 1]


def test_stage_and_fence_without_a_save_do_nothing(memory_url: str) -> None:
    with opened(memory_url) as running:
        running.stage()
        running.fence()
    assert running.stats.saves == 0


# -- the directory ---------------------------------------------------------------------------------------------------


def test_a_directory_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StorageError, match=r"holds something else.*thesis\.tex.*Choose an empty or new directory"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_second_run_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(DirectoryInUseError, match="in use by process"):
        opened(tmp_path)
    opened(tmp_path).close()


def test_a_run_that_lost_its_directory_saves_nothing_any_more(tmp_path: Path) -> None:
    with opened(tmp_path) as running:
        save_tensors(running, 1, x=torch.zeros(4))
        running._membership._lease.lost = True
        with pytest.raises(StorageError, match="another run has taken"):
            running.save({"state_dict": {"x": torch.ones(4)}}, 2)
    assert load(tmp_path)["state_dict"]["x"].tolist() == [0, 0, 0, 0]


# -- going on from what is there -------------------------------------------------------------------------------------


def test_a_resumed_run_continues_the_saved_copy_and_the_ages(memory_url: str) -> None:
    training, seen = linear_training(), []

    def watched(candidates: Candidates) -> Tensor:
        seen.append(candidates)
        return candidates.distance

    with opened(memory_url, fraction=0.5) as running:
        for _ in range(4):
            training.step()
            training.save(running)
    before = saved_steps(memory_url)
    with opened(memory_url, fraction=0.5, policy=watched) as running:
        restored = running.restore()
        assert {key: version.step for key, version in restored.plan.versions.items()} == before
        training.load(restored.checkpoint)
        training.step()
        training.save(running)
        assert (running.stats.saves, running.stats.full_saves) == (1, 0)
        expected = sorted(training.steps - step for step in before.values())
        assert sorted(torch.cat([candidates.age for candidates in seen]).tolist()) == expected
    written, after = written_blocks(memory_url, 5), saved_steps(memory_url)
    assert 0 < len(written) < len(after)
    assert {key: step for key, step in after.items() if key not in written}.items() <= before.items()


def test_the_first_save_after_a_resume_measures_against_what_was_restored(memory_url: str) -> None:
    x = torch.zeros(8, 4)
    with opened(memory_url) as running:
        save_tensors(running, 1, x=x)
    with opened(memory_url, fraction=1 / 8) as running:
        x = running.restore().checkpoint["state_dict"]["x"]
        x[5] += 3
        x[6] += 4
        save_tensors(running, 2, x=x)
        assert running.stats.distance == pytest.approx(6.0)
    assert steps_of(memory_url, "x") == [1, 1, 1, 1, 1, 1, 2, 1]


def test_a_resumed_run_looks_once_at_what_is_frozen_and_writes_it_no_more(memory_url: str) -> None:
    def frozen_below() -> Training:
        training = linear_training()
        training.model[0].requires_grad_(False)
        return training

    training = frozen_below()
    training.step()
    with opened(memory_url) as running:
        training.save(running)
    for _ in range(3):
        with opened(memory_url) as running:
            resumed = frozen_below()
            resumed.load(running.restore().checkpoint)
            for _ in range(2):
                resumed.step()
                resumed.save(running)
    assert set(steps_of(memory_url, "0.weight")) == {1}
    assert set(steps_of(memory_url, "1.weight")) == {7}
    assert_same(load(memory_url), resumed.checkpoint())


def test_a_run_resumed_many_times_stays_right(memory_url: str) -> None:
    training = linear_training()
    for _ in range(5):
        with opened(memory_url, fraction=0.4) as running:
            if training.steps:
                training.load(running.restore().checkpoint)
            for _ in range(2):
                training.step()
                training.save(running)
            training.save(running, full=True)
    assert_same(load(memory_url), training.checkpoint())


def test_another_block_size_is_left_aside_with_one_warning(memory_url: str) -> None:
    x = torch.zeros(8, 4)
    with opened(memory_url, block_size=16) as running:
        save_tensors(running, 1, x=x)
    with opened(memory_url, block_size=64) as running:
        with pytest.warns(UserWarning, match=r"block_size=64 is ignored.*started with 16") as caught:
            running.restore()
        x += 1
        save_tensors(running, 2, x=x)
    assert len(caught) == 1
    assert steps_of(memory_url, "x") == [2] * 8


def test_the_automatic_block_size_stays_what_it_was_at_the_first_save(memory_url: str) -> None:
    with opened(memory_url, block_size=None) as running:
        save_tensors(running, 1, x=torch.zeros(4000))
    with opened(memory_url, block_size=None) as running, warnings.catch_warnings():
        warnings.simplefilter("error")
        running.restore()
        save_tensors(running, 2, x=torch.zeros(4000), y=torch.zeros(17 * 2**20, dtype=torch.uint8))
        assert running._stager.bases.map.block_size == 4096


def test_a_fresh_run_replaces_an_older_one_once_its_first_save_is_durable(memory_url: str) -> None:
    with opened(memory_url) as running:
        save_tensors(running, 50, x=torch.full((4, 4), 5.0), old=torch.ones(4))
    with opened(memory_url) as running:
        with writes_held(running):
            running.save_now({"state_dict": {"x": torch.zeros(4, 4)}}, 1)
            assert load(memory_url)["state_dict"]["x"].unique().tolist() == [5.0]
        drain(running)
        assert list(load(memory_url)["state_dict"]) == ["x"]
        assert load(memory_url)["state_dict"]["x"].unique().tolist() == [0.0]
        assert {delta.head.incarnation for delta in running.store.deltas} == {2}


def test_a_fresh_run_never_takes_the_older_ones_values_for_its_own(memory_url: str) -> None:
    x = torch.zeros(4, 4)
    with opened(memory_url) as running:
        save_tensors(running, 50, x=x)
    with opened(memory_url, fraction=0.25) as running:
        save_tensors(running, 1, x=x)
        assert running.stats.full_saves == 1
    assert steps_of(memory_url, "x") == [1, 1, 1, 1]


def test_a_hole_is_never_filled_with_initial_values(tmp_path: Path) -> None:
    x = torch.zeros(4, 4)
    with opened(tmp_path, fraction=0.25) as running:
        save_tensors(running, 1, x=x)
        for step in (2, 3):
            x += 1
            save_tensors(running, step, x=x)
    [first] = tmp_path.glob("rank-0000/delta-*-00000000.safetensors")
    first.unlink()
    with pytest.raises(IncompleteError, match=r"no intact version of block state_dict/x\[.*not filled with initial"):
        load(tmp_path)
