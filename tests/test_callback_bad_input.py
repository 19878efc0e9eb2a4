"""Every bad input gets one clear exception or warning that names the value and the remedy, and loses nothing."""

import os
import re
import resource
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    Stopped,
    TinyModel,
    WrittenTogether,
    assert_blocks_as_lived,
    assert_same,
    cut_short,
    files,
    fit,
    loader,
    make_trainer,
    saver,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_scar import SCARCheckpoint, load
from lightning_scar.core.restoration import IncompleteError, NoCheckpointError
from lightning_scar.storage.delta import NewerFormatError, StorageError
from lightning_scar.storage.lease import DirectoryInUseError


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(MisconfigurationException, match=rf"fraction={fraction!r} must be in \(0, 1\].*e.g. 0.125"):
        SCARCheckpoint("a", every_n_train_steps=1, fraction=fraction)


@pytest.mark.parametrize(
    ("intervals", "given"),
    [
        (
            {"every_n_train_steps": 5, "train_time_interval": timedelta(seconds=5)},
            "every_n_train_steps=5 and train_time_interval=datetime.timedelta(seconds=5)",
        ),
        ({"every_n_train_steps": 5, "max_overhead": 0.02}, "every_n_train_steps=5 and max_overhead=0.02"),
    ],
)
def test_there_must_not_be_two_intervals(intervals: dict[str, Any], given: str) -> None:
    message = f"{given}; give one of them, or none for max_overhead=0.01"
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        SCARCheckpoint("a", **intervals)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("every_n_train_steps", 0),
        ("every_n_train_steps", True),
        ("every_n_train_steps", 2.5),
        ("train_time_interval", 30.0),
        ("train_time_interval", timedelta(0)),
        ("train_time_interval", "0:10:00"),
        ("max_overhead", 0.0),
        ("max_overhead", 1),
        ("max_overhead", -0.5),
        ("max_overhead", float("nan")),
        ("max_overhead", True),
        ("max_overhead", "1 %"),
        ("full_every_n_saves", 0),
        ("full_every_n_saves", True),
        ("policy", "nearest"),
        ("block_size", 0),
        ("max_age", -1),
        ("staging", "later"),
        ("on_write_error", "ignore"),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(MisconfigurationException, match=rf"{name}={re.escape(repr(value))} must be"):
        SCARCheckpoint("a", **{name: value})


def test_a_policy_that_returns_nonsense_is_named(memory_url: str) -> None:
    with pytest.raises(ValueError, match="must return one priority per block"):
        fit(saver(memory_url, policy=lambda candidates: torch.zeros(1)))


# -- the directory -------------------------------------------------------------------------------------------------


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StorageError, match=r"holds something else.*thesis\.tex.*empty or new directory"):
        fit(saver(tmp_path))
    assert files(tmp_path) == ["thesis.tex"]


def test_a_newer_format_asks_for_an_upgrade_and_is_left_alone(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_scar.storage.delta_file.FORMAT_VERSION", 9)
        cut_short(saver(tmp_path), after=4)
    before = files(tmp_path)
    with pytest.raises(NewerFormatError, match=r"has format 9.*upgrade lightning-scar"):
        fit(saver(tmp_path))
    with pytest.raises(NewerFormatError, match="has format 9"):
        load(tmp_path)
    assert files(tmp_path) == before


def test_nothing_but_damage_is_not_taken_for_a_fresh_directory(tmp_path: Path) -> None:
    cut_short(saver(tmp_path), after=4)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    before = files(tmp_path)
    with pytest.raises(NoCheckpointError, match=r"only damaged files(.|\n)*resume=False"):
        fit(saver(tmp_path))
    assert files(tmp_path) == before
    assert min(fit(saver(tmp_path, resume=False)).live) == 1


def test_a_hole_is_not_filled_with_initial_values_silently(tmp_path: Path) -> None:
    scar = saver(tmp_path, fraction=0.2, block_size=64)
    cut_short(scar, WrittenTogether(scar), after=6)
    full = min(tmp_path.rglob("*.safetensors"))
    full.unlink()
    with pytest.raises(IncompleteError, match=r"no intact version of block .* not filled with initial values"):
        load(tmp_path)
    with pytest.warns(
        UserWarning,
        match=r"is incomplete.\n.*blocks \(.*\) from initial values; \d+ of these refreshed\. The distance .* known",
    ):
        fit(saver(tmp_path))


def test_two_live_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    refused = []

    class StartsAnother(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                with pytest.raises(DirectoryInUseError, match=rf"in use by process {os.getpid()} .*another dirpath"):
                    fit(saver(tmp_path))
                refused.append(True)

    model = fit(saver(tmp_path), StartsAnother())
    assert refused
    assert_same(load(tmp_path)["state_dict"], model.live[16]["state_dict"])


def test_a_directory_is_free_again_after_a_failed_run(tmp_path: Path) -> None:
    class Fails(TinyModel):
        def on_train_start(self) -> None:
            raise Stopped

    with pytest.raises(Stopped):
        fit(saver(tmp_path), model=Fails())
    fit(saver(tmp_path))


# -- the disk ------------------------------------------------------------------------------------------------------


def test_an_unwritable_directory_does_not_stop_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    scar = saver(tmp_path / "file" / "scar", full_every_n_saves=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = fit(scar)
    assert max(model.live) == 16
    assert sum("lightning-scar" in str(warning.message) for warning in caught) == 1
    assert scar.stats.failed_saves == scar.stats.saves == 17
    assert (tmp_path / "file").read_text() == "precious"


def test_an_unwritable_directory_stops_the_training_if_asked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    model = TinyModel()
    with pytest.raises(NotADirectoryError):
        fit(saver(tmp_path / "file" / "scar", on_write_error="raise"), model=model)
    assert model.live == {}


@pytest.fixture(autouse=True)
def _space() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class _FullFrom(Callback):
    """From one batch on until another no file grows beyond its first kilobyte: what a full disk or a quota does."""

    def __init__(self, first: int, last: int = 1000) -> None:
        self.first, self.last = first, last

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        # On a busy machine a save might be written when the limit is gone again.
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SCARCheckpoint) and callback._running is not None:
                callback._running.flush()
        done = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024 if self.first <= done < self.last else most, most))


@pytest.mark.parametrize("options", [{"fraction": 0.3}, {"full_every_n_saves": 1}])
def test_a_disk_that_is_full_for_a_while_costs_only_the_saves_of_that_time(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    scar = saver(tmp_path, block_size=64, **options)
    model = TinyModel()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cut_short(scar, _FullFrom(4, 9), after=14, model=model)
    assert sum("failed, training continues" in str(warning.message) for warning in caught) == 1
    assert scar.stats.failed_saves > 0
    assert max(assert_blocks_as_lived(tmp_path, model.live)) >= 9
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_keeps_the_last_good_state(tmp_path: Path) -> None:
    model = TinyModel()
    with pytest.warns(UserWarning, match="failed, training continues"):
        cut_short(saver(tmp_path, full_every_n_saves=1), _FullFrom(5), after=14, model=model)
    assert assert_blocks_as_lived(tmp_path, model.live) <= {3, 4, 5}


def test_a_full_disk_stops_the_training_if_asked_and_the_rest_stays_intact(tmp_path: Path) -> None:
    model = TinyModel()
    with pytest.raises(OSError, match="File too large"):
        fit(saver(tmp_path, full_every_n_saves=1, on_write_error="raise"), _FullFrom(5), model=model)
    assert 5 <= max(model.live) < 16
    assert assert_blocks_as_lived(tmp_path, model.live) <= {3, 4, 5}


def test_a_run_that_a_full_disk_stopped_goes_on_when_there_is_space(tmp_path: Path) -> None:
    stopped = TinyModel()
    with pytest.raises(OSError, match="File too large"):
        fit(saver(tmp_path, full_every_n_saves=1, on_write_error="raise"), _FullFrom(5), model=stopped)
    newest = max(assert_blocks_as_lived(tmp_path, stopped.live))
    resumed = fit(saver(tmp_path), _FullFrom(1000))
    assert min(resumed.live) in (newest, newest + 1)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_keeps_the_last_good_state(tiny_disk: Path) -> None:
    model = TinyModel(width=512)  # 60 KB with its state
    scar = saver(tiny_disk / "scar", full_every_n_saves=1)
    hog = _Fills(tiny_disk / "hog", after=3, scar=scar)
    with pytest.warns(UserWarning, match="No space left on device"):
        cut_short(scar, hog, after=10, model=model)
    assert scar.stats.failed_saves > 0
    assert max(assert_blocks_as_lived(tiny_disk / "scar", model.live)) <= 4


class _Fills(Callback):
    def __init__(self, path: Path, after: int, scar: SCARCheckpoint) -> None:
        self.path, self.after, self.scar = path, after, scar

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.after:
            # What a commit deletes afterwards would make room again.
            self.scar._running.flush()  # type: ignore[union-attr]
            with suppress(OSError), open(self.path, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))


# -- strategies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_sharded_strategies_are_refused(strategy: type, tmp_path: Path) -> None:
    class Made(strategy):  # type: ignore[misc,valid-type]
        """Its constructor may want accelerators and libraries that are not here."""

        def __init__(self) -> None:
            pass

    loop = make_trainer()
    loop._accelerator_connector.strategy = Made()
    with pytest.raises(MisconfigurationException, match=r"does not support Made.*`strategy='ddp'`"):
        saver(tmp_path / "scar").setup(loop, TinyModel(), "fit")
    assert not (tmp_path / "scar").exists()


def test_a_single_device_is_not_refused(tmp_path: Path) -> None:
    make_trainer(saver(tmp_path), max_steps=1).fit(TinyModel(), loader())
