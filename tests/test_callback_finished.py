"""A finished run that is started again: it is no error, and trains on where the limits are higher."""

import logging
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyModel, assert_same, cut_short, fit, loader, make_trainer, saver
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer
from zoo import WithValidation

from lightning_scar import load


def finished_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "finished run" in record.message]


def other_weights() -> TinyModel:
    model = TinyModel()
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 12}])
def test_a_finished_run_started_again_is_loaded_and_the_script_goes_on(
    tmp_path: Path, limits: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = fit(saver(tmp_path / "scar"), data=WithValidation(), **limits)
    tested = first.trainer.test(first, loader())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert finished_lines(caplog) == []
    for _ in range(2):
        caplog.clear()
        model = other_weights()
        trainer = make_trainer(saver(tmp_path / "scar"), **limits)
        trainer.fit(model, datamodule=WithValidation())
        (line,) = finished_lines(caplog)
        assert line.startswith(f"lightning-scar: {tmp_path / 'scar'} holds a finished run: step ")
        assert line.endswith("Nothing is left to train, so fit only loads it.")
        assert (model.seen, model.live, trainer.num_sanity_val_steps) == ([], {}, 2)
        assert trainer.global_step == first.trainer.global_step
        assert_same(dict(model.state_dict()), dict(first.state_dict()))
        assert trainer.test(model, loader()) == tested
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before


def shuffled() -> Any:
    return loader(shuffle=True, generator=torch.Generator().manual_seed(3))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("asked_for", [True, False])
@pytest.mark.parametrize(
    ("limits", "higher"),
    [
        ({"max_epochs": 2}, {"max_epochs": 3}),
        ({"max_epochs": -1, "max_steps": 12}, {"max_epochs": -1, "max_steps": 20}),
        ({"max_epochs": -1, "max_steps": 8}, {"max_epochs": -1, "max_steps": 20}),
        ({"max_epochs": 1, "max_time": "00:01:00:00"}, {"max_epochs": 3, "max_time": "00:02:00:00"}),
    ],
)
def test_a_finished_run_trains_on_to_higher_limits_and_says_so(
    tmp_path: Path,
    limits: dict[str, Any],
    higher: dict[str, Any],
    asked_for: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    whole = fit(saver(tmp_path / "whole"), data=shuffled(), **higher)
    first = fit(saver(tmp_path / "cut"), data=shuffled(), **limits)
    model = fit(saver(tmp_path / "cut"), data=shuffled(), ckpt_path=tmp_path / "cut" if asked_for else None, **higher)
    (line,) = finished_lines(caplog)
    assert f"It trains on: max_epochs={higher['max_epochs']}, max_steps=" in line
    assert first.seen + model.seen == whole.seen
    assert_same(dict(model.state_dict()), dict(whole.state_dict()))
    assert load(tmp_path / "cut")["global_step"] == whole.trainer.global_step
    assert trains_nothing(tmp_path / "cut", **higher)


def trains_nothing(dirpath: Path, *callbacks: Callback, **options: Any) -> bool:
    return fit(saver(dirpath), *callbacks, **options).seen == []


def test_a_finished_run_is_replaced_when_asked(tmp_path: Path) -> None:
    fit(saver(tmp_path))
    model = fit(saver(tmp_path, resume=False), max_epochs=1)
    assert list(model.live) == list(range(1, 9))
    assert load(tmp_path)["global_step"] == 8


def test_a_run_replaced_and_cut_short_resumes_as_the_new_one(tmp_path: Path) -> None:
    fit(saver(tmp_path))
    cut_short(saver(tmp_path, resume=False, full_every_n_saves=1), after=3)
    model = fit(saver(tmp_path))
    assert min(model.live) == 4


def test_a_run_whose_time_is_up_is_not_finished(tmp_path: Path) -> None:
    class Slow(TinyModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(0.03)
            return super().training_step(batch, batch_idx)

    model = fit(saver(tmp_path), model=Slow(), max_time=timedelta(seconds=0.15))
    done = max(model.live)
    assert done < 8
    model = fit(saver(tmp_path))
    assert min(model.live) == done + 1
    assert load(tmp_path)["global_step"] == 16


def test_a_run_whose_time_is_up_is_loaded_when_it_gets_no_more(tmp_path: Path) -> None:
    class Slow(TinyModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(0.03)
            return super().training_step(batch, batch_idx)

    first = fit(saver(tmp_path), model=Slow(), max_time=timedelta(seconds=0.15))
    again = fit(saver(tmp_path), model=other_weights(), max_time=timedelta(seconds=0.15))
    assert again.seen == []
    assert_same(dict(again.state_dict()), dict(first.state_dict()))
    more = fit(saver(tmp_path), max_time=timedelta(hours=1))
    assert min(more.live) == max(first.live) + 1
    assert max(more.live) == 16


def test_a_timer_with_time_left_does_not_keep_a_run_from_finishing(tmp_path: Path) -> None:
    fit(saver(tmp_path), Timer(timedelta(hours=1)))
    assert trains_nothing(tmp_path, Timer(timedelta(hours=1)))


def test_a_run_that_early_stopping_ended_stays_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def stopping() -> EarlyStopping:
        return EarlyStopping("loss", patience=1, min_delta=100, check_on_train_epoch_end=True)

    first = fit(saver(tmp_path), stopping(), max_epochs=9)
    assert max(first.live) == 16
    for limit in (9, 20):
        caplog.clear()
        assert trains_nothing(tmp_path, stopping(), max_epochs=limit)
        (line,) = finished_lines(caplog)
        assert line.endswith(f"It was stopped early, so fit only loads it; to train on, pass ckpt_path='{tmp_path}'.")
    # The user asks for at least so many.
    more = fit(saver(tmp_path), stopping(), max_epochs=9, min_epochs=4)
    assert list(more.live) == list(range(17, 33))
    more = fit(saver(tmp_path), stopping(), max_epochs=9, ckpt_path=tmp_path)
    assert list(more.live) == list(range(33, 41))
