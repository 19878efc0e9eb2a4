"""Which of several checkpoints is meant: ``ckpt_path="last"``, and Lightning's own one on SLURM."""

import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from helpers import TinyModel, assert_same, cut_short, fit, loader, make_trainer, saver
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_scar import load

EXACT = {"fraction": 1.0, "full_every_n_saves": 1}


def messages(caplog: pytest.LogCaptureFixture, *words: str) -> list[str]:
    return [record.message for record in caplog.records if all(word in record.message for word in words)]


# -- last ----------------------------------------------------------------------------------------------------------


def test_last_is_the_running_checkpoint_if_there_is_no_other(tmp_path: Path) -> None:
    cut_short(saver(tmp_path, **EXACT), after=5)
    saved = load(tmp_path)["state_dict"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*no last checkpoint")
        model = TinyModel()
        trainer = make_trainer(saver(tmp_path))
        trainer.validate(model, loader(), ckpt_path="last")
        assert_same(dict(model.state_dict()), dict(saved))
        assert trainer.global_step == 0
        resumed = fit(saver(tmp_path, **EXACT), ckpt_path="last")
        assert min(resumed.live) == 6
        # Asked for, it counts even so.
        resumed = fit(saver(tmp_path, resume=False), ckpt_path="last", max_epochs=3)
        assert list(resumed.live) == list(range(17, 25))
        assert fit(saver(tmp_path), ckpt_path="last", max_epochs=3).seen == []


def test_last_of_a_model_checkpoint_goes_before(tmp_path: Path) -> None:
    def last() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=3, save_top_k=1)

    cut_short(saver(tmp_path / "scar", **EXACT), last(), after=5)
    model = fit(saver(tmp_path / "scar", **EXACT), last(), ckpt_path="last")
    assert min(model.live) == 4
    shutil.rmtree(tmp_path / "scar")


def test_last_warns_as_ever_if_there_is_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no last checkpoint"):
        model = fit(saver(tmp_path), ckpt_path="last")
    assert min(model.live) == 1


# -- SLURM ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"JOB_ID": 1, "JOB_NAME": "train", "NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


def interrupted(root: Path, running: int | None, preempted: int | None) -> None:
    """Leaves a running checkpoint, and one that Lightning saves when SLURM ends a job, of these steps."""
    if preempted is not None:
        trainer = make_trainer(enable_checkpointing=False, max_steps=preempted)
        trainer.fit(TinyModel(), loader())
        trainer.save_checkpoint(root / "hpc_ckpt_2.ckpt")
    if running is not None:
        cut_short(saver(root / "scar", **EXACT), after=running)


@pytest.mark.usefixtures("on_slurm")
@pytest.mark.parametrize(
    ("running", "preempted", "meant"), [(5, 3, 5), (3, 5, 5), (4, 4, 4), (None, 3, 3), (3, None, 3)]
)
def test_on_slurm_the_newer_of_two_checkpoints_is_meant(
    running: int | None, preempted: int | None, meant: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tmp_path, running, preempted)
    caplog.set_level(logging.INFO)
    caplog.clear()
    model = fit(saver(tmp_path / "scar", **EXACT), default_root_dir=tmp_path)
    assert min(model.live) == meant + 1
    said = messages(caplog, "lightning-scar", "hpc_ckpt_2.ckpt")
    assert len(said) == (running is not None and preempted is not None)
    for line in said:
        assert f"step {running}" in line
        assert f"step {preempted}" in line
        assert ("is as new as" if running == preempted else "is newer than") in line
        assert line.startswith("lightning-scar: Lightning's") == (meant != running)


@pytest.mark.usefixtures("on_slurm")
def test_on_slurm_an_explicit_path_wins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupted(tmp_path, running=5, preempted=3)
    caplog.set_level(logging.INFO)
    caplog.clear()
    model = fit(saver(tmp_path / "scar", **EXACT), default_root_dir=tmp_path, ckpt_path="hpc")
    assert min(model.live) == 4
    assert messages(caplog, "lightning-scar") == []


@pytest.mark.usefixtures("on_slurm")
def test_on_slurm_a_damaged_checkpoint_does_not_hide_the_running_one(tmp_path: Path) -> None:
    interrupted(tmp_path, running=3, preempted=5)
    path = tmp_path / "hpc_ckpt_2.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"lightning-scar: .*hpc_ckpt_2.ckpt cannot be read"):
        model = fit(saver(tmp_path / "scar", **EXACT), default_root_dir=tmp_path)
    assert min(model.live) == 4


@pytest.mark.usefixtures("on_slurm")
def test_on_slurm_a_finished_run_stays_finished_and_is_what_is_tested(tmp_path: Path) -> None:
    interrupted(tmp_path, running=None, preempted=3)
    shutil.move(tmp_path / "hpc_ckpt_2.ckpt", tmp_path / "kept")
    first = fit(saver(tmp_path / "scar", **EXACT))
    shutil.move(tmp_path / "kept", tmp_path / "hpc_ckpt_2.ckpt")
    model = TinyModel()
    trainer = make_trainer(saver(tmp_path / "scar"), max_epochs=2, default_root_dir=tmp_path)
    trainer.fit(model, loader())
    assert model.seen == []
    assert_same(dict(model.state_dict()), dict(first.state_dict()))
    trainer.test(model, loader())
    assert_same(dict(model.state_dict()), dict(first.state_dict()))


def test_elsewhere_nobody_asks_for_it(tmp_path: Path) -> None:
    interrupted(tmp_path, running=3, preempted=5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s)lightning-scar")
        model = fit(saver(tmp_path / "scar", **EXACT), default_root_dir=tmp_path)
    assert min(model.live) == 4
    assert torch.load(tmp_path / "hpc_ckpt_2.ckpt", weights_only=False)["global_step"] == 5
