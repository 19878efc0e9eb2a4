"""What a run resumes from, and that it then is where it was."""

import logging
import warnings
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from helpers import (
    BATCH_SIZE,
    TinyModel,
    WithABody,
    assert_same,
    cut_short,
    fit,
    loader,
    make_trainer,
    samples,
    saver,
)
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from zoo import ZOO, StepsInItsHook, Way, WithValidation

from lightning_scar import SCARCheckpoint, SCARCheckpointIO, load
from lightning_scar.core.compatibility import ModelMismatchError
from lightning_scar.core.restoration import NoCheckpointError

EXACT = {"fraction": 1.0, "full_every_n_saves": 1}  # no save is skipped, however slow the disk


def stateful(**options: Any) -> Any:
    data = samples()
    # Another order in every epoch, which a generator of torchdata's own loses track of when it resumes.
    sampler = DistributedSampler(data, num_replicas=1, rank=0, shuffle=True)
    return StatefulDataLoader(data, batch_size=BATCH_SIZE, sampler=sampler, **options)


def in_one_go(way: Way, url: str, data: Any) -> TinyModel:
    model, callbacks, options = way()
    return fit(saver(url, **EXACT), *callbacks, model=model, data=data, **options)


def in_two_goes(way: Way, url: str, data: Any, after: int) -> TinyModel:
    """What the second of two runs ends with; ``seen`` has the batches of both."""
    model, callbacks, options = way()
    first = cut_short(saver(url, **EXACT), *callbacks, after=after, model=model, data=data, **options)
    model, callbacks, options = way()
    # What would be right by chance must go wrong.
    for parameter in model.parameters():
        parameter.data.normal_()
    second = fit(saver(url, **EXACT), *callbacks, model=model, data=data, **options)
    second.seen[:0] = first.seen
    return second


def assert_same_end(resumed: TinyModel, whole: TinyModel) -> None:
    assert resumed.seen == whole.seen
    keys = set(whole.final) - {"callbacks", "loops"}
    assert keys >= {"state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"}
    assert_same({k: resumed.final[k] for k in sorted(keys)}, {k: whole.final[k] for k in sorted(keys)})


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("way", "after"), [*((way, 6) for way in ZOO), ("a schedule", 8), ("a schedule", 10)])
def test_a_resumed_run_ends_as_an_uninterrupted_one(way: str, after: int, memory_url: str) -> None:
    whole = in_one_go(ZOO[way], f"{memory_url}/whole", WithValidation(stateful))
    resumed = in_two_goes(ZOO[way], f"{memory_url}/cut", WithValidation(stateful), after)
    assert_same_end(resumed, whole)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_precision_that_changes_torchs_default_type_beside_a_save_goes_on(precision: str, tmp_path: Path) -> None:
    def way() -> Any:
        return TinyModel(), [], {"precision": precision}

    whole = in_one_go(way, str(tmp_path / "whole"), stateful())
    resumed = in_two_goes(way, str(tmp_path / "cut"), stateful(), after=6)
    assert_same_end(resumed, whole)
    scar = saver(str(tmp_path / "refreshed"), fraction=0.3, block_size=64)
    refreshed = fit(scar, model=TinyModel(), data=stateful(), precision=precision)
    assert_same(refreshed.final["state_dict"], whole.final["state_dict"])


def test_a_resumed_run_ends_as_an_uninterrupted_one_with_workers(tmp_path: Path) -> None:
    data = partial(stateful, num_workers=2)
    whole = in_one_go(ZOO["Adam"], str(tmp_path / "whole"), data())
    resumed = in_two_goes(ZOO["Adam"], str(tmp_path / "cut"), data(), after=5)
    assert_same_end(resumed, whole)


def test_no_step_of_a_modules_own_hook_is_lost(memory_url: str) -> None:
    whole = in_one_go(lambda: (StepsInItsHook(), [], {}), f"{memory_url}/whole", stateful())
    for after in (1, 5):
        resumed = in_two_goes(lambda: (StepsInItsHook(), [], {}), f"{memory_url}/{after}", stateful(), after)
        assert_same_end(resumed, whole)


def test_random_numbers_go_on_if_the_user_saves_their_state(tmp_path: Path) -> None:
    """What rides in the skeleton is the user's own: here the state of torch's generator."""

    class Noisy(TinyModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return super().training_step((x + torch.randn(x.shape), y), batch_idx)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["rng"] = torch.get_rng_state()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.rng = checkpoint["rng"]

        def on_train_start(self) -> None:
            if hasattr(self, "rng"):
                torch.set_rng_state(self.rng)

    seed_everything(7, verbose=False)
    whole = in_one_go(lambda: (Noisy(), [], {}), str(tmp_path / "whole"), stateful())
    seed_everything(7, verbose=False)
    resumed = in_two_goes(lambda: (Noisy(), [], {}), str(tmp_path / "cut"), stateful(), after=5)
    assert_same_end(resumed, whole)


def test_a_partially_saved_run_resumes_with_its_newest_blocks_and_reaches_the_end(memory_url: str) -> None:
    cut_short(saver(memory_url, fraction=0.2, block_size=64), after=10)
    saved = load(memory_url)
    model = TinyModel()

    class Loaded(ModelCheckpoint):
        def on_train_start(self, *args: Any) -> None:
            assert_same(dict(model.state_dict()), dict(saved["state_dict"]))

    fit(saver(memory_url, fraction=0.2), Loaded(memory_url, save_top_k=0), model=model, data=stateful())
    assert max(model.live) == 16


def test_the_resume_is_told_in_one_line(memory_url: str, caplog: pytest.LogCaptureFixture) -> None:
    cut_short(saver(memory_url, fraction=0.2, block_size=64), after=10)
    caplog.clear()
    caplog.set_level(logging.INFO)
    fit(saver(memory_url))
    lines = [record.message for record in caplog.records if "running checkpoint" in record.message]
    assert len(lines) == 1
    assert memory_url in lines[0]
    assert "step 10" in lines[0]
    assert "age of the oldest block" in lines[0]


def test_a_fresh_directory_is_begun_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fit(saver(tmp_path))
    assert not [record for record in caplog.records if "running checkpoint" in record.message]


def test_another_ckpt_path_wins(tmp_path: Path) -> None:
    other = ModelCheckpoint(
        tmp_path, filename="other", every_n_train_steps=3, save_top_k=1, enable_version_counter=False
    )
    cut_short(saver(tmp_path / "scar", **EXACT), other, after=5)
    model = fit(saver(tmp_path / "scar", **EXACT), ckpt_path=tmp_path / "other.ckpt", data=stateful())
    assert min(model.live) == 4
    assert load(tmp_path / "scar")["global_step"] == 16


def test_a_run_begun_from_another_ckpt_path_resumes_as_itself(tmp_path: Path) -> None:
    other = ModelCheckpoint(
        tmp_path, filename="other", every_n_train_steps=3, save_top_k=1, enable_version_counter=False
    )
    cut_short(saver(tmp_path / "old", **EXACT), other, after=5)
    first = cut_short(saver(tmp_path / "old", **EXACT), after=7, ckpt_path=tmp_path / "other.ckpt", data=stateful())
    assert min(first.live) == 4
    second = fit(saver(tmp_path / "old", **EXACT), data=stateful())
    assert min(second.live) == max(first.live) + 1


class Hyper(TinyModel):
    def __init__(self, where: Path) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_arguments_of_fit_reach_the_loading(tmp_path: Path) -> None:
    cut_short(saver(tmp_path, **EXACT), after=3, model=Hyper(Path("a")))
    model = Hyper(Path("a"))
    make_trainer(saver(tmp_path, **EXACT), max_epochs=1).fit(model, loader(), weights_only=False)
    assert min(model.live) == 4


def test_what_the_next_fit_will_not_load_is_told_at_the_first_save(tmp_path: Path) -> None:
    def told(path: Path, **options: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(saver(path, **EXACT), max_steps=3).fit(Hyper(Path("a")), loader(), **options)
        return [str(warning.message) for warning in caught if "weights_only" in str(warning.message)]

    (text,) = told(tmp_path / "a")
    assert "refuses hyper_parameters/where (pathlib" in text
    with pytest.raises(UnpicklingError):
        told(tmp_path / "a")
    assert told(tmp_path / "b", weights_only=False) == []
    assert told(tmp_path / "b", weights_only=False) == []


# -- ckpt_path=dirpath ---------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    fit(saver(tmp_path / "scar"))
    return tmp_path / "scar"


FRONT_DOORS = {
    "only the callback": lambda path: {"callbacks": [SCARCheckpoint(path, every_n_train_steps=1)]},
    "only the plugin": lambda path: {"plugins": [SCARCheckpointIO()], "default_root_dir": path.parent},
}


@pytest.mark.parametrize("door", FRONT_DOORS)
@pytest.mark.parametrize("as_text", [str, Path])
def test_evaluation_loads_the_directory(trained: Path, door: str, as_text: Any) -> None:
    expected = TinyModel()
    expected.load_state_dict(load(trained)["state_dict"])
    options = FRONT_DOORS[door](trained)
    loop = make_trainer(*options.pop("callbacks", []), **options)
    path = as_text(trained)
    reference = make_trainer(enable_checkpointing=False)
    assert loop.validate(TinyModel(), loader(), ckpt_path=path) == reference.validate(expected, loader())
    assert loop.test(TinyModel(), loader(), ckpt_path=path) == reference.test(expected, loader())
    predicted = loop.predict(TinyModel(), loader(), ckpt_path=path)
    assert_same(predicted, reference.predict(expected, loader()))


def test_evaluation_leaves_the_directory_alone(trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    make_trainer(saver(trained)).validate(TinyModel(), loader(), ckpt_path=trained)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


@pytest.mark.parametrize("door", FRONT_DOORS)
def test_fit_goes_on_from_the_directory(trained: Path, door: str) -> None:
    options = FRONT_DOORS[door](trained)
    model = TinyModel()
    loop = make_trainer(*options.pop("callbacks", []), **options, max_epochs=3)
    loop.fit(model, loader(), ckpt_path=trained)
    assert list(model.live) == list(range(17, 25))


def test_evaluation_does_not_load_what_it_was_not_asked_to(trained: Path) -> None:
    model = TinyModel()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_trainer(saver(trained)).validate(model, loader())
    assert_same(dict(model.state_dict()), before)


def test_a_fit_that_failed_early_leaves_the_next_call_alone(trained: Path) -> None:
    class FailsOnce(TinyModel):
        failed = False

        def configure_model(self) -> None:
            if not self.failed:
                self.failed = True
                raise RuntimeError("not yet")

    model = FailsOnce()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loop = make_trainer(saver(trained))
    with pytest.raises(RuntimeError, match="not yet"):
        loop.fit(model, loader())
    loop.validate(model, loader())
    assert_same(dict(model.state_dict()), before)


def test_a_directory_without_a_running_checkpoint_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError, match="holds no running checkpoint"):
        fit(saver(tmp_path), ckpt_path=tmp_path)


# -- another model -------------------------------------------------------------------------------------------------


class Other(TinyModel):
    """One parameter more, one less, one of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 1))
        self.extra = nn.Parameter(torch.zeros(1))


def test_another_models_differences_are_listed(tmp_path: Path) -> None:
    cut_short(saver(tmp_path, **EXACT), after=4)
    with pytest.raises(ModelMismatchError) as error:
        fit(saver(tmp_path), model=Other())
    for line in ("missing: extra", "extra: net.0.bias", "reshaped: net.0.weight is (32, 8)", "`strict=False`"):
        assert line in str(error.value)
    assert load(tmp_path)["global_step"] == 4


def test_what_fits_is_loaded_if_the_user_says_so(tmp_path: Path) -> None:
    cut_short(saver(tmp_path, **EXACT), after=4)
    saved = load(tmp_path)["state_dict"]
    with pytest.warns(UserWarning, match="reshaped: net.0.weight"):
        model = cut_short(saver(tmp_path, strict=False, **EXACT), after=6, model=_AtStart())
    assert torch.equal(model.at_start["net.2.bias"], saved["net.2.bias"])
    assert model.at_start["net.0.weight"].shape == (16, 8)
    assert min(model.live) == 5
    resumed = fit(saver(tmp_path, **EXACT), model=_AtStart())
    assert_same(dict(resumed.at_start), dict(model.live[6]["state_dict"]))


class _AtStart(Other):
    def on_train_start(self) -> None:
        self.at_start = {name: value.clone() for name, value in self.state_dict().items()}


def test_a_hook_of_the_users_may_make_it_fit(tmp_path: Path) -> None:
    class Renamed(WithABody):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name.replace("net", "body"): value for name, value in state.items()}

    cut_short(saver(tmp_path, **EXACT), after=4)
    model = fit(saver(tmp_path, **EXACT), model=Renamed())
    assert min(model.live) == 5
