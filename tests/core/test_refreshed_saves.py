"""Saves with a refresh: what is restored is what the writer believed, and near to the live state."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from belief import Belief, Believed, assert_restored
from core_helpers import Training, assert_same, drain, rows_of, saved_steps
from ranks import run_ranks
from shared_helpers import Sharded, make_training
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_scar.core.ranks import Ranks
from lightning_scar.core.restoration import load
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings
from lightning_scar.storage.delta import StoredRefresh


def opened(url: str | Path, **settings: Any) -> RunningCheckpoint:
    return RunningCheckpoint(url, Settings(**{"fraction": 0.4, "block_size": 256, **settings}))


def refresh_of(running: RunningCheckpoint, name: str) -> StoredRefresh | None:
    """The refresh of a group in the newest delta."""
    delta = max(running.store.deltas, key=lambda delta: (delta.head.incarnation, delta.head.sequence))
    return next((refresh for refresh in delta.refreshes if refresh.group == name), None)


def codecs_of(running: RunningCheckpoint, name: str) -> dict[str, str]:
    found = refresh_of(running, name)
    return {slot: stored.codec for slot, stored in found.slots.items()} if found is not None else {}


# -- what is restored is what the writer believed ----------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: optim.Adam(p, lr=0.01),
    "AdamW with amsgrad": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.01),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.01),
}


class Net(nn.Module):
    """Ragged blocks, channels-last weights, tied weights, a frozen layer and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(6, 10, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(10)
        self.wide = nn.Linear(37, 23)
        self.tied = nn.Linear(37, 23, bias=False)
        self.tied.weight = self.wide.weight
        self.frozen = nn.Linear(9, 9).requires_grad_(False)


def assert_believed(training: Training, url: str, steps: int = 5, **settings: Any) -> None:
    """At every step, and once more from where a resumed run goes on."""
    refreshed = 0
    for _ in range(2):
        with opened(url, **settings) as running:
            if training.steps:
                training.load(running.restore().checkpoint)
            belief = Belief(running)
            for _ in range(steps):
                training.step()
                training.save(running)
                assert_restored(load(url), belief.rows())
                refreshed += belief.refreshed
    assert refreshed > 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_restored_is_what_the_writer_believed_to_be_saved(kind: str, memory_url: str) -> None:
    model = Net()
    assert_believed(Training(model, OPTIMIZERS[kind](list(model.parameters()))), memory_url)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("staging", ["lazy", "eager"])
def test_so_it_is_in_every_precision(dtype: torch.dtype, staging: str, memory_url: str) -> None:
    model = Net().to(dtype)
    assert_believed(Training(model, optim.Adam(model.parameters(), lr=0.01)), memory_url, staging=staging)


def believed_by_a_rank(rank: int, url: str, resume: bool, sharded: bool) -> tuple[list[Believed], int]:
    training = Sharded() if sharded else make_training(40)
    settings = Settings(fraction=0.4, block_size=256)
    with RunningCheckpoint(url, settings, ranks=Ranks.of_default_group()) as running:
        if resume:
            training.load(running.restore().checkpoint)
        belief = Belief(running)
        for _ in range(4):
            training.step()
            training.save(running)
        return belief.rows(), belief.refreshed


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "ZeRO"])
def test_several_ranks_believe_in_their_parts(sharded: bool, tmp_path: Path) -> None:
    url = str(tmp_path / "scar")
    for n, resume in ((2, False), (2, True)) if sharded else ((3, False), (2, True)):
        results = run_ranks(believed_by_a_rank, n, url, resume, sharded)
        checkpoint = load(url)
        for rows, refreshed in results:
            assert refreshed > 0
            assert_restored(checkpoint, rows)


# -- how near that is --------------------------------------------------------------------------------------------------


def distance_of(a: dict[str, Any], b: dict[str, Any]) -> float:
    return math.hypot(*(float((a["state_dict"][k] - b["state_dict"][k]).norm()) for k in a["state_dict"]))


@pytest.mark.parametrize("staging", ["lazy", "eager"])
def test_the_distance_that_is_told_is_that_of_what_is_restored(staging: str, memory_url: str) -> None:
    training = make_training(40)
    with opened(memory_url, staging=staging) as running:
        for _ in range(6):
            training.step()
            training.save(running)
            true_distance = distance_of(load(memory_url), training.checkpoint())
            assert running.stats.distance == pytest.approx(true_distance, rel=1e-3, abs=1e-6)
        assert running.stats.distance > 0


def test_a_consistent_state_has_no_refresh(memory_url: str) -> None:
    training, history = make_training(40), {}
    with opened(memory_url) as running:
        for _ in range(5):
            training.step()
            history[training.steps] = copy.deepcopy(training.checkpoint())
            training.save(running, full=training.steps == 3)
        assert refresh_of(running, "state_dict/0.weight") is not None
    assert_same(load(memory_url, consistent=True), history[3])


@pytest.mark.parametrize("options", [{"fraction": 1.0}, {"refresh": None}], ids=str)
def test_who_saves_everything_and_who_wants_none_has_no_refresh(options: dict[str, Any], memory_url: str) -> None:
    training = make_training(40)
    with opened(memory_url, **options) as running:
        for _ in range(3):
            training.step()
            training.save(running)
        assert not any(delta.refreshes for delta in running.store.deltas)


def test_a_full_save_has_no_refresh_and_is_exact(memory_url: str) -> None:
    training = make_training(40)
    with opened(memory_url) as running:
        for full in (True, False, True):
            training.step()
            training.save(running, full=full)
            assert (refresh_of(running, "state_dict/0.weight") is None) == full
    assert_same(load(memory_url), training.checkpoint())


# -- what has no refresh -----------------------------------------------------------------------------------------------


class One(Training):
    """One parameter of eight rows in blocks of one row, and what Adam keeps of it."""

    def __init__(self, rows: int = 8) -> None:
        torch.manual_seed(0)
        model = nn.Linear(64, rows, bias=False)
        super().__init__(model, optim.Adam(model.parameters(), lr=0.01))

    @property
    def weight(self) -> Tensor:
        return self.model.weight

    def moment(self, name: str) -> Tensor:
        found: Tensor = self.optimizers[0].state[self.weight][name]
        return found


@pytest.mark.parametrize("slot", ["param", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3.4e38])
@pytest.mark.filterwarnings("ignore:lightning-scar")
def test_a_block_with_a_value_that_cannot_be_encoded_is_left_out(slot: str, bad: float, memory_url: str) -> None:
    training = One()
    with opened(memory_url) as running:
        for _ in range(2):
            training.step()
            training.save(running)
        before = load(memory_url)
        training.step()
        tensor = training.weight.data if slot == "param" else training.moment(slot)
        tensor[5, 3] = -bad if slot == "exp_avg" else bad
        training.save(running)
        found = refresh_of(running, "state_dict/weight")
        assert found is not None
        is_encoded = (5, 6) in found.spans
    after = load(memory_url)
    if not math.isfinite(bad):
        assert not is_encoded
        for name in ("exp_avg", "exp_avg_sq"):
            assert after["optimizer_states"][0]["state"][0][name].isfinite().all()
        assert after["state_dict"]["weight"].isfinite().all()
    assert not torch.equal(after["state_dict"]["weight"][4], before["state_dict"]["weight"][4])
    assert not after["state_dict"]["weight"].isnan().any()


def test_a_moment_that_looked_non_negative_at_first_is_noticed_and_changes_its_codec(memory_url: str) -> None:
    training = One()
    with opened(memory_url, fraction=0.3) as running:
        for step in range(1, 8):
            training.weight.grad = torch.full_like(training.weight, 1.0 if step < 4 else -9.0)
            training.optimizers[0].step()
            training.steps += 1
            training.save(running)
            kinds = {slot: codec.rstrip("248") for slot, codec in codecs_of(running, "state_dict/weight").items()}
            if step in (2, 3):
                assert kinds["exp_avg"] == "log"
            if step == 4:
                assert not kinds, "all blocks have become negative"
            if step > 4:
                assert kinds["exp_avg"] == "linear"
            assert kinds.get("exp_avg_sq", "log") == "log"
    found, live = load(memory_url)["optimizer_states"][0]["state"][0]["exp_avg"], training.moment("exp_avg")
    assert bool((found < 0).all())
    torch.testing.assert_close(found, live, rtol=0.2, atol=0)


def test_a_resumed_run_knows_from_the_refresh_which_moments_are_signed(memory_url: str) -> None:
    training = One()
    for turn in range(2):
        with opened(memory_url, fraction=0.3) as running:
            if turn:
                training.load(running.restore().checkpoint)
            for _ in range(2):
                training.step()
                training.save(running)
                if turn:
                    kinds = {s: codec.rstrip("248") for s, codec in codecs_of(running, "state_dict/weight").items()}
                    assert kinds == {"param": "linear", "exp_avg": "linear", "exp_avg_sq": "log"}


def test_a_block_that_has_come_back_to_its_base_is_restored_as_its_base(memory_url: str) -> None:
    x = torch.zeros(64, 64)
    with opened(memory_url, fraction=0.2) as running:
        for step in (1, 2, 3):
            running.save_now({"state_dict": {"x": x}}, step, parameters=[x])
            drain(running)
            if step == 1:
                x += torch.randn(64, 64)
            elif step == 2:
                rest = [rows_of(key) for key, saved in saved_steps(memory_url).items() if saved == 1 and "/x[" in key]
                assert rest
                for rows in rest:
                    x[rows] = 0
        assert running.stats.distance == 0
    assert_same(load(memory_url)["state_dict"]["x"], x)


# -- what goes on from there -------------------------------------------------------------------------------------------


class Regression(Training):
    """A real training with a convex loss, whose gradients depend on where it is."""

    def __init__(self, optimizer: Callable[[Any], Optimizer]) -> None:
        torch.manual_seed(0)
        model = nn.Linear(64, 32)
        super().__init__(model, optimizer(model.parameters()))
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(256, 64, generator=generator)
        self.y = self.x @ torch.randn(64, 32, generator=generator)

    def loss(self) -> Tensor:
        return (self.model(self.x) - self.y).square().mean()

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        self.optimizers[0].zero_grad()
        self.loss().backward()
        self.optimizers[0].step()


ADAM = partial(optim.Adam, lr=0.03)
MOMENTUM = partial(optim.SGD, lr=0.3, momentum=0.8)


def test_a_refresh_brings_what_is_restored_many_times_nearer(memory_url: str) -> None:
    left = {}
    for refresh in ("auto", None):
        training, url = Regression(ADAM), f"{memory_url}/{refresh}"
        with opened(url, fraction=0.2, refresh=refresh) as running:
            for _ in range(12):
                training.step()
                training.save(running)
            left[refresh] = distance_of(load(url), training.checkpoint()), running.stats.rework_cost
    assert left["auto"][0] < 0.3 * left[None][0]
    assert left["auto"][1] < 0.3 * left[None][1]


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["SGD with momentum", "Adam"])
def test_in_twenty_kills_in_a_row_errors_do_not_add_up(optimizer: Any, memory_url: str) -> None:
    undisturbed, losses = Regression(optimizer), []
    history = {}
    for _ in range(61):
        undisturbed.step()
        losses.append(undisturbed.loss().item())
        history[undisturbed.steps] = copy.deepcopy(undisturbed.checkpoint())
    errors = []
    for kill in range(20):
        training = Regression(optimizer)
        # Nothing is saved at its end, as if it had been killed.
        with opened(memory_url, fraction=0.35) as running:
            if kill:
                training.load(running.restore().checkpoint)
            for _ in range(3):
                training.step()
                training.save(running)
        errors.append(distance_of(load(memory_url), history[training.steps]))
    reached = next(step for step, loss in enumerate(losses, start=1) if loss <= training.loss().item())
    # Each kill would cost up to three where nothing is saved.
    assert training.steps - reached <= 4
    assert errors[-1] <= max(errors[:-1]), "they grow without end"


def test_rows_of_an_embedding_that_were_never_seen_do_not_explode_after_a_resume(memory_url: str) -> None:
    def embedding() -> tuple[Training, Callable[[], float]]:
        torch.manual_seed(0)
        model = nn.Embedding(600, 32)
        training = Training(model, optim.Adam(model.parameters(), lr=0.01))

        def step() -> float:
            training.steps += 1
            # Ever more rows, some of them seldom.
            generator = torch.Generator().manual_seed(training.steps)
            tokens = (torch.rand(64, generator=generator).square() * 40 * training.steps).long()
            training.optimizers[0].zero_grad()
            loss = model(tokens).square().sum(1).mean()
            loss.backward()
            training.optimizers[0].step()
            return loss.item()

        return training, step

    training, step = embedding()
    with opened(memory_url, fraction=0.2, block_size=1024) as running:
        for _ in range(6):
            step()
            training.save(running)
    unseen = training.optimizers[0].state[training.model.weight]["exp_avg_sq"].sum(1) == 0
    assert 100 < int(unseen.sum()) < 500
    resumed, step_resumed = embedding()
    resumed.load(load(memory_url))
    weight, state = resumed.model.weight, resumed.optimizers[0].state[resumed.model.weight]
    assert torch.equal(weight[unseen], training.model.weight[unseen])
    assert not state["exp_avg_sq"][unseen].any()
    assert not state["exp_avg"][unseen].any()
    before = weight.detach().clone()
    for _ in range(4):
        expected, found = step(), step_resumed()
        assert found == pytest.approx(expected, rel=0.05)
        # Adam's steps are about as long as its rate.
        assert float((weight - before).abs().max()) < 0.05
        before = weight.detach().clone()


def test_lazy_saves_with_a_refresh_hold_the_values_from_before_the_step_that_follows(memory_url: str) -> None:
    training = make_training(40)
    with opened(memory_url, staging="lazy") as running:
        belief = Belief(running)
        for _ in range(5):
            training.step()
            training.begin(running, wait=True)
            running.stage()
            expected = copy.deepcopy(training.checkpoint())
            running.fence()
            with torch.no_grad():
                for parameter in training.model.parameters():
                    parameter.mul_(1.5)
            drain(running)
            assert_restored(load(memory_url), belief.rows())
            assert distance_of(load(memory_url), expected) == pytest.approx(running.stats.distance, rel=1e-3, abs=1e-6)
