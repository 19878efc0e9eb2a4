"""The reproductions of ``benchmarks.paper`` compute what they say, and their quick runs show the papers' signs."""

import copy
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import prepared
import pytest
import torch

from benchmarks import data
from benchmarks.paper import bounds, comparison, networks, trials
from benchmarks.paper.factorization import Factorization
from benchmarks.paper.strategies import FEW, FULL, LOST, REFRESH, STRATEGIES, Strategy
from benchmarks.paper.tasks import tasks
from benchmarks.paper.topics import TopicModel
from benchmarks.paper.training import Training, chance
from benchmarks.paper.trials import Outcome, Task, Trial
from lightning_scar.core.selection import Candidates

DIGITS = tasks()["mlr_digits"]


def test_the_data_are_what_they_should_be() -> None:
    users, films, stars = data.movielens()
    assert (len(stars), int(users.max()) + 1, int(films.max()) + 1) == (100_000, 943, 1682)
    assert set(stars.tolist()) == {1, 2, 3, 4, 5}
    documents = data.reuters()
    assert (len(documents), sum(sum(counts.values()) for counts in documents)) == (395, 84_010)
    assert bytes(data.bible()[:16].tolist()) == b"In the beginning"
    assert data.digits().pixels.shape == (1797, 64)
    assert data.mnist().pixels.shape == (5000, 784)


def test_ratings_may_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "u.data"
    path.write_text("7\t30\t4\t881250949\n5\t20\t1\t881250950\n7\t20\t5\t881250951\n")
    users, films, stars = data.movielens(path)
    assert (users.tolist(), films.tolist(), stars.tolist()) == ([1, 0, 1], [1, 0, 0], [4, 1, 5])


def test_a_package_that_pip_does_not_find_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "_CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match=r"pip download .* recbole"):
        data.packaged("recbole", "any")


@pytest.mark.parametrize("name", tasks())
def test_a_training_depends_on_its_seed_and_goes_on_alike_from_a_copy(name: str) -> None:
    first, other = tasks()[name].start(1), tasks()[name].start(2)
    for training in (first, other):
        for _ in range(2):
            training.step()
    again = copy.deepcopy(first)
    again.recovered()
    assert again.parameters()[0].data_ptr() != first.parameters()[0].data_ptr()
    for training in (first, again, other):
        training.step()
    assert again.loss() == first.loss() != other.loss()
    assert first.loss() < tasks()[name].start(1).loss()


def test_batches_of_one_seed_are_not_those_of_the_next() -> None:
    seen = {torch.rand((), generator=chance(seed, number)).item() for seed in range(4) for number in range(50)}
    assert len(seen) == 200


def test_alternating_least_squares_does_not_see_the_scale_of_its_state() -> None:
    plain, scaled = Factorization(None, False, 3), Factorization(None, True, 3)
    losses = []
    for _ in range(5):
        plain.step()
        scaled.step()
        losses.append(plain.loss())
        assert scaled.loss() == pytest.approx(losses[-1], rel=1e-4)
    assert losses == sorted(losses, reverse=True)


def test_gibbs_sampling_moves_tokens_between_topics_only() -> None:
    model = TopicModel(0)
    tokens = model._counts.sum(1)
    for _ in range(3):
        model.step()
    assert torch.equal(model._counts.sum(1), tokens)
    totals = model._by_document.clone(), model._by_word.clone()
    model.recovered()
    assert all(torch.equal(now, then) for now, then in zip((model._by_document, model._by_word), totals, strict=True))


def test_a_token_is_drawn_as_the_formula_says() -> None:
    """Against the collapsed Gibbs sampler token by token: with its own token taken out of all counts."""
    model = TopicModel(0)
    documents, words, old = torch.tensor([0]), torch.tensor([model_word()]), torch.tensor([4])
    by_document, by_word = model._by_document.clone(), model._by_word.clone()
    by_document[0, 4] -= 1
    by_word[words[0], 4] -= 1
    shares = (by_document[0] + 0.1) * (by_word[words[0]] + 0.01) / (by_word.sum(0) + 4258 * 0.01)
    expected = (shares / shares.sum()).double()
    chances = (torch.arange(20_000, dtype=torch.float32) + 0.5) / 20_000
    many = [each.expand(20_000).contiguous() for each in (documents, words, old)]
    drawn = torch.bincount(model._drawn(*many, chances), minlength=len(expected)) / 20_000
    assert torch.allclose(drawn.double(), expected, atol=1e-3)


def model_word() -> int:
    """A word of the first document."""
    return next(iter(data.reuters()[0]))


def test_no_run_exceeds_the_bound_and_some_come_close() -> None:
    found = bounds.measure(trials=30, seed=1)
    assert [found[f"{kind}_over_bound"] for kind in bounds.KINDS] == [0, 0, 0]
    assert max(found[f"{kind}_most_of_bound"] for kind in bounds.KINDS) > 0.9
    assert found["adversarial_rework_cost"] > found["random_rework_cost"]


def test_failures_come_within_the_training_in_early_periods_more_often_and_in_all_places_of_one() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [trials.strikes_after(seed, 59, generator) for seed in range(1600)]
    assert (min(drawn), max(drawn)) == (8, 55)
    assert sum(each < 24 for each in drawn) > 1.5 * sum(each >= 40 for each in drawn)
    assert set(torch.bincount(torch.tensor(drawn) % 8).tolist()) == {200}


def test_what_is_chosen_at_random_differs_from_trial_to_trial() -> None:
    blocks = Candidates(torch.zeros(50), torch.ones(50), torch.zeros(50), step=3, preconditioner=torch.ones(50))
    drawn = [trials._at_random(seed, replace(blocks, step=step)) for seed, step in ((0, 3), (0, 4), (1, 3))]
    assert torch.equal(trials._at_random(0, blocks), drawn[0])
    assert not any(torch.equal(drawn[i], drawn[i - 1]) for i in range(3))


def test_all_strategies_save_the_same_share_in_the_same_time() -> None:
    assert {strategy.fraction / strategy.every(largest_block=0.1) for strategy in STRATEGIES} == {1 / 8}
    assert {strategy.every(largest_block=0.75) for strategy in STRATEGIES if not strategy.refresh} == {6, 8}
    # Beside its largest block it holds the refresh of the others.
    assert REFRESH.every(largest_block=0.75) == 7
    assert len({strategy.name for strategy in STRATEGIES}) == len(STRATEGIES) == 11
    assert [strategy.name for strategy in STRATEGIES if strategy.refresh] == ["refresh 1/8"]


def at(failed: int, monkeypatch: pytest.MonkeyPatch, strategies: Sequence[Strategy] = FEW) -> Trial:
    """A trial that fails after a certain iteration."""
    monkeypatch.setattr(trials, "strikes_after", lambda seed, last, fate: failed)
    return trials.run(DIGITS, 0, strategies)


def test_what_was_just_saved_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = at(16, monkeypatch, [FULL])
    assert [outcome.squared_distance for outcome in trial.outcomes] == [0.0] * len(LOST)
    assert [outcome.rework_cost for outcome in trial.outcomes] == pytest.approx([0.0] * len(LOST))


def test_losing_more_costs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = at(15, monkeypatch, [FULL])
    distances = [outcome.squared_distance for outcome in trial.outcomes]
    costs = [outcome.rework_cost for outcome in trial.outcomes]
    assert distances == sorted(distances)
    assert costs == sorted(costs)
    # All of it is seven iterations old.
    assert 5 < costs[-1] < 9
    assert all(outcome.is_back for outcome in trial.outcomes)


def test_bytes_are_those_of_what_is_saved_without_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = at(16, monkeypatch, [FULL, STRATEGIES[-2], REFRESH])
    state = (64 + 1) * 10 * 4
    assert trial.nominal["full"] == state / 8
    # No more than an eighth, and less by no more than a block.
    assert state / 8 - 160 < trial.nominal["random 1/8"] <= state / 8
    assert 0 < trial.nominal["refresh 1/8"] < state
    assert all(trial.nbytes[name] > trial.nominal[name] for name in trial.nominal)


def test_what_a_refresh_holds_is_nearer_than_what_blocks_of_different_ages_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {}
    for strategy in (STRATEGIES[-4], REFRESH):
        monkeypatch.setattr(trials, "strikes_after", lambda seed, last, fate: 11)
        trial = trials.run(tasks()["cnn_shards"], 0, [strategy])
        found[strategy.name] = next(o.squared_distance for o in trial.outcomes if o.lost == 1)
    assert 0 < found["refresh 1/8"] < 0.5 * found["distance 1/8"]


def test_counts_have_no_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    topics = tasks()["lda"]
    assert [strategy.name for strategy in STRATEGIES if not topics.suits(strategy)] == ["refresh 1/8"]
    assert all(task.suits(REFRESH) for task in tasks().values() if task.name != "lda")
    small = replace(DIGITS, is_refreshed=False)
    monkeypatch.setattr(trials, "strikes_after", lambda seed, last, fate: 9)
    assert list(trials.run(small, 0, [FULL, REFRESH]).saves) == ["full"]


def test_only_lost_blocks_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[int] = []
    real = trials.RunningCheckpoint.heal

    def heal(self: Any, *args: Any, **kwargs: Any) -> Any:
        plan = real(self, *args, **kwargs)
        restored.append(sum(plan[key].rank is None for key in plan))
        return plan

    monkeypatch.setattr(trials.RunningCheckpoint, "heal", heal)
    at(15, monkeypatch, [FULL])
    # The 64 pixels, four in a block, and the bias.
    assert restored == [4, 8, 13, 17]


def trial(seed: int, full: float, distance: float, names: Sequence[str] = [each.name for each in FEW]) -> Trial:
    """One with known costs."""
    costs = dict(zip((each.name for each in FEW), (full, distance, 2 * distance, 3 * distance, 0.1), strict=True))
    outcomes = [Outcome(name, lost, lost * costs[name], 1.0, True) for name in names for lost in LOST]
    nominal = {name: 90.0 if name == "refresh 1/8" else 100.0 for name in names}
    return Trial(seed, 40.0, 10, dict.fromkeys(names, 5), dict.fromkeys(names, 100), nominal, 0.1, outcomes)


def test_means_reductions_and_intervals() -> None:
    found = comparison.figures([trial(i, full=4.0 + i % 2, distance=1.0) for i in range(40)])
    assert found["full/1/rework_cost"] == 4.5
    assert found["distance 1/8/0.5/rework_cost"] == 0.5
    assert found["distance 1/8/0.5/reduction"] == pytest.approx(1 - 0.5 / 4.5)
    low, high = found["full/1/rework_cost_interval"]
    # The interval of a mean of forty values of which half is one higher.
    assert (low, high) == pytest.approx((4.5 - 1.96 * 0.5 / math.sqrt(40), 4.5 + 1.96 * 0.5 / math.sqrt(40)), abs=0.03)
    assert (found["full/saves"], found["full/bytes"]) == (0.5, 10.0)
    assert comparison.difference(found, "distance 1/8", "round_robin 1/8") == [-0.5, -0.5]
    _, verdict, refresh, against = comparison.conclusions("mlr", found)
    assert verdict == "mlr: priority (0.50) beats round robin (1.00); random 1.50."
    assert "at 0.90 times the bytes of full checkpoints, half lost saves 99% (99% to 99%)" in refresh
    assert against == "mlr: the refresh (0.05) beats exact blocks alone (0.50)."


def test_targets_of_a_task() -> None:
    found = comparison.figures([trial(i, full=4.0 + i % 2, distance=1.0) for i in range(8)])
    aims = {aim.name: aim for aim in comparison.targets("mf", found)}
    assert {name: aim.limit for name, aim in aims.items()} == {
        "mf: rework cost left, half lost": 0.22,
        "mf: left with a refresh, half lost": 0.05,
        "mf: left with a refresh, all lost": 0.15,
        "mf: bytes of blocks and refresh over full": 1.0,
    }
    assert all(aim.met for aim in aims.values())
    assert aims["mf: left with a refresh, half lost"].value == pytest.approx(0.05 / 4.5)
    assert [aim.limit for aim in comparison.targets("recommender", found)] == [0.2, 1.0]
    assert [aim.limit for aim in comparison.targets("mf_plain", found)] == [1.0]


def test_some_strategies_alone_are_shown_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = comparison.figures([trial(i, 4.0 + i % 2, 1.0, ["full", "refresh 1/8"]) for i in range(4)])
    comparison.show("mf", found)
    assert "refresh 1/8" in capsys.readouterr().out
    (said,) = comparison.conclusions("mf", found)
    assert "low-precision refresh" in said
    comparison.draw({"mf": found}, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 0


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return prepared.run(
        [sys.executable, "-m", "benchmarks.paper", *arguments],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=380,
    )


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_quick_run_shows_the_signs_of_the_paper(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    names = ["bounds", "mlr_digits", "mf", "lda", "recommender"]
    done = run(*names, "--quick", "--json", str(out), "--plots", str(tmp_path / "plots"))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    for name in names[1:]:
        figures = found[name]
        assert figures["never_back"] == 0
        assert ("refresh 1/8" in figures["strategies"]) == (name != "lda")
        # Of two failures what is left with a refresh is chance.
        for strategy in FEW[:-1]:
            costs = [figures[f"{strategy.name}/{lost:g}/rework_cost"] for lost in LOST]
            # Partial recovery costs no more than a full one.
            assert costs[1] < costs[-1], (name, strategy.name)
        priority, chosen_by_chance = (f"{policy} 1/8/1/squared_distance" for policy in ("distance", "random"))
        assert figures[priority] < figures[chosen_by_chance], name
        assert figures["distance 1/8/0.5/rework_cost"] < figures["full/1/rework_cost"], name
        assert f"{name}: half lost" in done.stdout
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"bounds.png", "tasks.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnist"], "there is no experiment mnist; choose from bounds, mlr_mnist"),
        (["--trials", "0"], "--trials 0 must be at least 1"),
        (["--strategies", "full,fast"], "there is no strategy fast; choose from full, distance 1/2"),
        (["--movielens", "/nowhere"], "--movielens /nowhere is not a file"),
    ],
)
def test_bad_input_is_told_at_once(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_recommender_moves_the_rows_of_its_batches_only() -> None:
    training = networks.recommender(None, 0)
    before = [parameter.detach().clone() for parameter in training.parameters()[:2]]
    training.step()
    for table, old in zip(training.parameters()[:2], before, strict=True):
        moved = (table != old).any(1)
        assert 0 < int(moved.sum()) < len(moved)


def test_a_task_needs_nothing_but_its_name_in_another_process() -> None:
    import pickle

    for task in tasks().values():
        again: Task = pickle.loads(pickle.dumps(task))
        training: Training = again.start(0)
        assert np.isfinite(training.loss())
