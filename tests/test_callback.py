"""When ``SCARCheckpoint`` saves, what it reports, and how it gets on with the rest of a Trainer."""

import copy
import csv
import pickle
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    StopAfter,
    Stopped,
    TinyModel,
    assert_blocks_as_lived,
    assert_same,
    cut_short,
    files,
    fit,
    loader,
    make_trainer,
    saver,
)
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from zoo import Alternating, Raw, WithValidation

from lightning_scar import SCARCheckpoint, load
from lightning_scar.core.compatibility import ModelMismatchError
from lightning_scar.core.selection import Candidates, distance
from lightning_scar.core.settings import Settings
from lightning_scar.core.skeletons import is_skeleton
from lightning_scar.storage.store import DeltaStore


class RecordedSteps:
    """A policy that notes at which steps partial saves ask it."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, candidates: Candidates) -> Tensor:
        if candidates.step not in self.steps:
            self.steps.append(candidates.step)
        return distance(candidates)


# -- when ----------------------------------------------------------------------------------------------------------


def test_saves_fall_on_every_third_step(memory_url: str) -> None:
    policy = RecordedSteps()
    scar = saver(memory_url, every_n_train_steps=3, policy=policy)
    fit(scar)
    assert policy.steps == [6, 9, 12, 15]  # the first save, at 3, is full, and so is the last
    assert (scar.stats.saves, scar.stats.full_saves, scar.stats.step) == (6, 2, 16)


def test_saves_fall_between_accumulations(memory_url: str) -> None:
    policy = RecordedSteps()
    saves = []

    class Watching(TinyModel):
        def on_train_batch_start(self, *args: Any) -> None:
            saves.append(scar.stats.saves)

        def on_train_epoch_end(self) -> None:
            saves.append(scar.stats.saves)

    scar = saver(memory_url, policy=policy, staging="eager")
    fit(scar, model=Watching(), accumulate_grad_batches=3, max_epochs=1)
    assert policy.steps == [2, 3]
    # The last step of an epoch accumulates what is left.
    assert saves == [0, 0, 0, 1, 1, 1, 2, 2, 3]


def test_two_optimizers_by_hand_take_two_steps_a_batch(memory_url: str) -> None:
    policy = RecordedSteps()
    fit(saver(memory_url, every_n_train_steps=3, policy=policy), model=Alternating(), max_epochs=1)
    assert policy.steps == [6, 10, 12, 16]


def test_steps_of_raw_optimizers_count(memory_url: str) -> None:
    policy = RecordedSteps()
    cut_short(saver(memory_url, every_n_train_steps=2, policy=policy), after=7, model=Raw())
    assert policy.steps == [4, 6]
    more = RecordedSteps()
    fit(saver(memory_url, every_n_train_steps=2, policy=more), model=Raw())
    assert more.steps == [8, 10, 12, 14, 16]


def test_saves_follow_the_clock_if_told_so(memory_url: str) -> None:
    class Slow(TinyModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(0.02)
            return super().training_step(batch, batch_idx)

    often = saver(memory_url, train_time_interval=timedelta(seconds=0.03))
    rarely = saver(f"{memory_url}/b", train_time_interval=timedelta(hours=1))
    fit(often, model=Slow())
    fit(rarely, model=Slow())
    assert often.stats.saves >= 3
    assert rarely.stats.saves == 1


def test_the_last_save_holds_the_very_end(tmp_path: Path) -> None:
    model = fit(saver(tmp_path, every_n_train_steps=5, fraction=0.1))
    saved = load(tmp_path)
    assert_same(saved["state_dict"], model.live[16]["state_dict"])
    assert_same(saved["optimizer_states"], model.live[16]["optimizer_states"])


def test_a_partial_save_keeps_to_its_fraction(memory_url: str) -> None:
    cut_short(saver(memory_url, fraction=0.1, block_size=512), after=8, model=TinyModel(width=1024))
    store = DeltaStore(memory_url)
    store.refresh()
    sizes = [sum(b.nbytes for b in delta.blocks if not is_skeleton(b.key)) for delta in store.deltas]
    full, partial = sizes[0], sizes[1:]
    assert partial
    assert 0.05 * full < max(partial) <= 0.1 * full


def test_full_saves_in_between_give_a_state_of_one_step(memory_url: str) -> None:
    model = cut_short(saver(memory_url, full_every_n_saves=5, fraction=0.2, block_size=64), after=13)
    consistent = load(memory_url, consistent=True)
    assert consistent["global_step"] == 10
    assert_same(consistent["state_dict"], model.live[10]["state_dict"])
    assert_same(consistent["optimizer_states"], model.live[10]["optimizer_states"])
    assert len(assert_blocks_as_lived(memory_url, model.live)) > 1


def test_full_saves_are_counted_apart(memory_url: str) -> None:
    scar = saver(memory_url, full_every_n_saves=4)
    fit(scar)
    assert scar.stats.full_saves == 6  # the first; at 4, 8, 12 and 16; at the end
    assert scar.stats.full_stall_seconds > 0
    assert scar.stats.stall_seconds > 0


# -- exceptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [Stopped(), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_saves_what_there_is(tmp_path: Path, error: BaseException) -> None:
    model = TinyModel()
    scar = saver(tmp_path, every_n_train_steps=100, save_on_exception=True)
    with pytest.raises((Stopped, SystemExit)):
        fit(scar, StopAfter(11, error), model=model)
    saved = load(tmp_path)
    assert saved["global_step"] == 11
    assert_same(saved["state_dict"], model.live[11]["state_dict"])


def test_without_save_on_exception_nothing_is_saved(tmp_path: Path) -> None:
    scar = saver(tmp_path, every_n_train_steps=100, save_on_exception=False)
    cut_short(scar, after=11)
    assert scar.stats.saves == 0
    assert files(tmp_path) == []


def test_an_exception_right_after_a_partial_save_saves_the_rest(tmp_path: Path) -> None:
    scar = saver(tmp_path, every_n_train_steps=5, save_on_exception=True, block_size=64)
    model = cut_short(scar, after=10)
    assert scar.stats.full_saves == 2
    assert_same(load(tmp_path)["state_dict"], model.live[10]["state_dict"])


def test_the_users_exception_is_the_one_that_is_seen(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    scar = saver(tmp_path / "file" / "scar", every_n_train_steps=100, save_on_exception=True)
    with pytest.warns(UserWarning, match="cannot be written to"):
        cut_short(scar, after=3)
    assert scar.stats.failed_saves == 1


def test_an_exception_in_validation_keeps_the_older_save(tmp_path: Path) -> None:
    """Weight averaging may have swapped the weights there."""

    class Breaks(TinyModel):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.global_step:
                raise Stopped

    model = Breaks()
    scar = saver(tmp_path, every_n_train_steps=5, save_on_exception=True)
    with pytest.raises(Stopped):
        fit(scar, model=model, data=WithValidation())
    assert assert_blocks_as_lived(tmp_path, model.live) == {5}


# -- beside others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours_first", [True, False])
def test_best_is_the_model_checkpoints_in_any_order(tmp_path: Path, ours_first: bool) -> None:
    scar = saver(tmp_path / "scar")
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_top_k=2)
    stopping = EarlyStopping("val_loss", patience=2)
    loop = make_trainer(*([scar, best, stopping] if ours_first else [stopping, best, scar]), max_epochs=4)
    model = TinyModel()
    loop.fit(model, datamodule=WithValidation())
    assert len(files(tmp_path / "best")) == 2
    loop.test(ckpt_path="best", dataloaders=loader())
    expected = torch.load(best.best_model_path)["state_dict"]
    assert best.best_model_path.endswith(".ckpt")
    assert_same(dict(model.state_dict()), dict(expected))


def test_best_is_the_running_checkpoint_if_it_stands_alone(tmp_path: Path) -> None:
    scar = saver(tmp_path / "scar")
    assert scar.best_model_path == ""
    loop = make_trainer(scar, max_epochs=1)
    model = TinyModel()
    loop.fit(model, loader())
    trained = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.data.zero_()
    loop.test(ckpt_path="best", dataloaders=loader())
    assert_same(dict(model.state_dict()), dict(trained))


def test_a_trainer_tests_after_its_fit(tmp_path: Path) -> None:
    scar = saver(tmp_path)
    loop = make_trainer(scar, max_epochs=1)
    model = TinyModel()
    loop.fit(model, loader())
    before = files(tmp_path), scar.stats.saves
    assert loop.test(model, loader()) == loop.test(dataloaders=loader())
    assert (files(tmp_path), scar.stats.saves) == before


def test_a_trainer_fits_twice(tmp_path: Path) -> None:
    loop = make_trainer(saver(tmp_path), max_epochs=1)
    model = TinyModel()
    loop.fit(model, loader())
    loop.fit_loop.max_epochs = 2
    loop.fit(model, loader())
    assert list(model.live) == list(range(1, 17))
    assert_same(load(tmp_path)["state_dict"], model.live[16]["state_dict"])


def test_a_sweep_keeps_its_directories_apart(tmp_path: Path) -> None:
    models = [fit(saver(tmp_path / name), model=TinyModel(width)) for name, width in (("a", 8), ("b", 16))]
    for name, model in zip("ab", models, strict=True):
        assert_same(load(tmp_path / name)["state_dict"], model.live[16]["state_dict"])


def test_a_sweep_over_one_directory_is_told_so(tmp_path: Path) -> None:
    fit(saver(tmp_path), model=TinyModel(8))
    with pytest.raises(ModelMismatchError, match="another model"):
        fit(saver(tmp_path), model=TinyModel(16))


def test_metrics_reach_the_logger(tmp_path: Path) -> None:
    scar = saver(tmp_path / "scar")
    fit(scar, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    with open(tmp_path / "lightning_logs" / "version_0" / "metrics.csv") as file:
        table = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in table]
    assert steps == sorted(steps)
    saves = [float(row["scar/saves"]) for row in table if row["scar/saves"]]
    assert saves == sorted(saves)
    assert saves[-1] == scar.stats.saves
    for name in ("stall_seconds", "bytes_written", "queue_depth", "distance", "oldest_age"):
        assert any(row[f"scar/{name}"] for row in table)
    assert any(row["loss"] for row in table)


def test_fast_dev_run_does_nothing_at_all(tmp_path: Path) -> None:
    loop = make_trainer(saver(tmp_path / "scar"), fast_dev_run=True)
    loop.fit(TinyModel(), loader())
    assert not (tmp_path / "scar").exists()
    assert type(loop.strategy.checkpoint_io) is TorchCheckpointIO


def test_fast_dev_run_leaves_what_is_there_alone(tmp_path: Path) -> None:
    cut_short(saver(tmp_path), after=4)
    before = {path: (tmp_path / path).read_bytes() for path in files(tmp_path)}
    model = TinyModel()
    make_trainer(saver(tmp_path), fast_dev_run=True).fit(model, loader())
    assert list(model.live) == [1]
    assert {path: (tmp_path / path).read_bytes() for path in files(tmp_path)} == before


def test_the_search_for_a_learning_rate_writes_nothing(tmp_path: Path) -> None:
    class Tunable(TinyModel):
        lr = 0.01

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=self.lr)

    loop = make_trainer(saver(tmp_path / "scar"), max_epochs=1, default_root_dir=tmp_path)
    model = Tunable()
    Tuner(loop).lr_find(model, loader(30), num_training=20)
    assert files(tmp_path) == []
    loop.fit(model, loader())
    assert load(tmp_path / "scar")["global_step"] == 8


def test_training_works_outside_the_main_thread(tmp_path: Path) -> None:
    thread = threading.Thread(target=fit, args=(saver(tmp_path),))
    thread.start()
    thread.join(60)
    assert load(tmp_path)["global_step"] == 16


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scar: pickle.loads(pickle.dumps(scar))])
def test_a_copy_of_the_callback_works_like_it(tmp_path: Path, copied: Any) -> None:
    scar = SCARCheckpoint(tmp_path, every_n_train_steps=4, fraction=0.5, max_age=9)
    twin = copied(scar)
    assert vars(twin) == vars(scar)
    fit(twin)
    assert load(tmp_path)["global_step"] == 16
    assert scar.stats.saves == 0
    assert vars(copied(twin)).keys() == vars(twin).keys()


def test_the_defaults_are_those_of_the_settings() -> None:
    assert SCARCheckpoint("a", every_n_train_steps=1)._settings == Settings()


def test_a_model_that_turns_nan_does_not_spoil_its_running_checkpoint(memory_url: str) -> None:
    class Diverges(TinyModel):
        def on_before_optimizer_step(self, *args: Any) -> None:
            if self.global_step == 5:
                for parameter in self.parameters():
                    parameter.data.fill_(torch.nan)

    scar = saver(memory_url, fraction=0.5)
    with pytest.warns(UserWarning, match="hold NaN or Inf"):
        cut_short(scar, after=8, model=Diverges())
    assert scar.stats.non_finite_blocks > 0
    assert all(bool(values.isfinite().all()) for values in load(memory_url)["state_dict"].values())
