"""One loud test for each private part of Lightning that the package leans on.

When one of these fails after an upgrade, the function of the same name in ``lightning/private.py`` is what to look at.
"""

import dataclasses
import inspect
import os
import pickle
import re
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import TinyModel, loader, make_trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops import evaluation_loop, training_epoch_loop
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_scar.lightning import private, private_logs, private_paths, results
from lightning_scar.lightning.data import TrainingData
from lightning_scar.lightning.model_loading import intercept_loading

#: They make a process a replacement: ``test_lightning_joining.py`` compares it with the one that it replaces.
TESTED_BY_A_JOINER = {
    "compute_gradient",
    "transferred",
    "metrics",
    "set_metrics",
    "restore",
    "restore_step",
    "weights_beside",
}
#: ``test_lightning_covered_logs.py`` has them log.
TESTED_BY_LOGS = {"add_to_epoch", "apart", "before_sync", "kept", "of_batch", "reduction", "step_value"}


def in_training(hook: Any, **options: Any) -> TinyModel:
    """Calls ``hook(trainer)`` after every batch."""

    class Calls(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            hook(trainer)

    model = TinyModel()
    data = options.pop("data", loader())
    make_trainer(Calls(), max_epochs=1, enable_checkpointing=False, **options).fit(model, data)
    return model


def test_every_private_part_has_a_test() -> None:
    functions = {
        name
        for module in (private, private_logs, private_paths)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_lightning_*.py")]
    tested = {name for text in texts for name in re.findall(r"^def test_(\w+)", text, re.MULTILINE)}
    assert functions <= tested | TESTED_BY_A_JOINER | TESTED_BY_LOGS, "write a test for the new private part"


def test_dump_checkpoint() -> None:
    def check(trainer: pl.Trainer) -> None:
        checkpoint = private.dump_checkpoint(trainer)
        expected = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "epoch", "global_step"}
        assert expected <= checkpoint.keys(), "Lightning's checkpoint dict has lost a part"
        live = dict(trainer.lightning_module.named_parameters())
        for name, tensor in checkpoint["state_dict"].items():
            assert tensor.data_ptr() == live[name].data_ptr(), "the dict holds copies: saves would cost a whole copy"
        moments = trainer.optimizers[0].state[live["net.0.weight"]]
        saved = checkpoint["optimizer_states"][0]["state"][0]
        assert saved["exp_avg"].data_ptr() == moments["exp_avg"].data_ptr()
        checked.append(True)

    checked: list[bool] = []
    in_training(check)
    assert checked


def test_select_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connector = private_paths._CheckpointConnector
    monkeypatch.setattr(connector, "_select_ckpt_path", connector._select_ckpt_path)
    asked: list[Any] = []

    def select(trainer: pl.Trainer, ckpt_path: Any, is_model_given: bool, choose: Any) -> Any:
        assert not hasattr(trainer.lightning_module, "set_up")
        asked.append((trainer.state.fn, ckpt_path, is_model_given, choose(ckpt_path), choose("other")))
        return tmp_path / "a.ckpt"

    class SetUp(TinyModel):
        def setup(self, stage: str) -> None:
            self.set_up = True

    trainer = make_trainer(enable_checkpointing=False, max_steps=1)
    trainer.fit(TinyModel(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    private_paths.select_paths(select)
    trainer = make_trainer(enable_checkpointing=False, max_steps=3)
    trainer.fit(SetUp(), loader(), ckpt_path="b")
    assert trainer.global_step == 3
    for call in (trainer.validate, trainer.test, trainer.predict):
        call(TinyModel(), loader())
    expected = [("fit", "b", "b"), *((name, None, None) for name in ("validate", "test", "predict"))]
    assert asked == [(name, path, True, chosen, "other") for name, path, chosen in expected]


def test_slurm_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(enable_checkpointing=False, default_root_dir=tmp_path)
    for version in (1, 12, 3):
        (tmp_path / f"hpc_ckpt_{version}.ckpt").touch()
    assert private_paths.slurm_checkpoint(trainer) is None
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"}.items():
        monkeypatch.setenv(name, value)
    assert private_paths.slurm_checkpoint(trainer) == str(tmp_path / "hpc_ckpt_12.ckpt")


def test_overwrite_lost_files(tmp_path: Path) -> None:
    """Of an earlier run, of this one before its last save, lost since, and of this process."""
    trainer = make_trainer(ModelCheckpoint(tmp_path), default_root_dir=tmp_path)
    (callback,) = (each for each in trainer.callbacks if isinstance(each, ModelCheckpoint))
    now = time.time()
    for name, age in {"earlier": 1000, "before": 100, "lost": 10, "own": -10}.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - age, now - age))
    private_paths.overwrite_lost_files(trainer, since=now - 50)
    assert pickle.loads(pickle.dumps(callback)).dirpath == callback.dirpath
    found = [
        name for name in ("earlier", "before", "lost", "own", "none") if callback.file_exists(tmp_path / name, trainer)
    ]
    assert found == ["earlier", "before", "own"]


def test_after_batches() -> None:
    calls: list[str] = []

    class Notes(Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            private.after_batches(trainer, lambda: self.note(trainer, "first"))
            private.after_batches(trainer, lambda: self.note(trainer, "second"))

        def note(self, trainer: pl.Trainer, name: str) -> None:
            progress = trainer.fit_loop.epoch_loop.batch_progress.current
            # Lightning takes this for a checkpoint of `on_train_batch_end`: the batch is done, but not completed.
            assert (progress.ready, progress.processed, progress.completed) == (batches, batches, batches - 1)
            calls.append(name)

        def on_train_batch_end(self, *args: Any) -> None:
            calls.append("callback")

        def on_validation_start(self, *args: Any) -> None:
            calls.append("validation")

    class Counts(TinyModel):
        def on_train_batch_end(self, *args: Any) -> None:
            nonlocal batches
            batches += 1
            calls.append("module")

    batches, options = 0, {"max_steps": 2, "enable_checkpointing": False, "num_sanity_val_steps": 1}
    trainer = make_trainer(Notes(), val_check_interval=1, **options)
    trainer.fit(Counts(), loader(), loader(1))
    of_a_batch = ["callback", "module", "second", "first", "validation"]
    assert calls == ["validation", *of_a_batch, *of_a_batch]


def test_end_after_batches() -> None:
    trainer = make_trainer(enable_checkpointing=False)
    for _ in range(2):
        private.after_batches(trainer, lambda: None)
    private.end_after_batches(trainer)
    private.end_after_batches(trainer)
    assert "on_batch_end" not in vars(trainer._logger_connector)


@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize(
    "limits",
    [
        {"max_epochs": 2},
        {"max_epochs": 3},
        {"max_epochs": -1, "max_steps": 16},
        {"max_epochs": -1, "max_steps": 17},
        {"max_epochs": 9, "min_epochs": 2},
        {"max_epochs": 9, "min_epochs": 3},
        {"max_epochs": 9, "min_steps": 17},
    ],
)
def test_is_over(limits: dict[str, Any], stops: bool, tmp_path: Path) -> None:
    first = make_trainer(enable_checkpointing=False, max_epochs=2)
    first.fit(TinyModel(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    expected: list[bool] = []

    class Asks(Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = stops
            expected.append(private.is_over(trainer, torch.load(tmp_path / "a.ckpt")))

    model = TinyModel()
    make_trainer(Asks(), enable_checkpointing=False, **limits).fit(model, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert expected == [not model.seen]


def test_intercept_resume(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Intercepts(Callback):
        def __init__(self, chosen: Any) -> None:
            self.chosen = chosen

        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            private.intercept_resume(trainer, self.choose)

        def choose(self, *asked_for: Any) -> Any:
            seen.append(asked_for)
            return self.chosen

    # Lightning 2.5 has no such option.
    knows = "weights_only" in inspect.signature(pl.Trainer.fit).parameters
    options: dict[str, Any] = {"weights_only": False} if knows else {}
    source = make_trainer(enable_checkpointing=False, max_steps=1)
    source.fit(TinyModel(), loader())
    source.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt")
    checkpoint["state_dict"]["net.2.bias"] = torch.full((1,), 7.0)
    for chosen, asked_for, steps, bias in (
        (checkpoint, None, 1, 7.0),
        (str(tmp_path / "a.ckpt"), None, 1, float(source.model.net[2].bias)),  # type: ignore[union-attr]
        (None, str(tmp_path / "a.ckpt"), 0, float(TinyModel().net[2].bias)),
    ):
        model = TinyModel()
        loop = make_trainer(Intercepts(chosen), enable_checkpointing=False, max_steps=steps)
        loop.fit(model, loader(), ckpt_path=asked_for, **options)
        assert seen.pop() == (asked_for, options.get("weights_only")), "Lightning reads its checkpoint in another way"
        assert loop.global_step == steps
        assert float(model.net[2].bias) == bias, "what is chosen must be what is restored"
        assert "resume_start" not in vars(loop._checkpoint_connector), "an interception is for one call"


def test_intercept_loading(tmp_path: Path) -> None:
    seen: list[str] = []

    class Intercepts(Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            intercept_loading(trainer, self.model, self.optimizers)

        def model(self, load: Any, checkpoint: dict[str, Any], strict: bool) -> None:
            state = {**checkpoint["state_dict"], "net.2.bias": torch.full((1,), 7.0)}
            seen.append(f"model, {strict=}")
            load({**checkpoint, "state_dict": state}, strict=strict)

        def optimizers(self, load: Any, checkpoint: dict[str, Any]) -> None:
            seen.append(f"{len(checkpoint['optimizer_states'])} optimizers")
            load(checkpoint)

    source = make_trainer(enable_checkpointing=False, max_steps=1)
    source.fit(TinyModel(), loader())
    source.save_checkpoint(tmp_path / "a.ckpt")
    model = TinyModel()
    loop = make_trainer(Intercepts(), enable_checkpointing=False, max_steps=1)
    loop.fit(model, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert seen == ["model, strict=True", "1 optimizers"], "Lightning loads in another way"
    assert float(model.net[2].bias) == 7
    assert "load_model_state_dict" not in vars(loop.strategy)
    assert "load_optimizer_state_dict" not in vars(loop.strategy)


def test_end_interception() -> None:
    loop = make_trainer(enable_checkpointing=False)
    private.end_interception(loop)  # without one, nothing
    private.intercept_resume(loop, lambda asked_for, weights_only: pytest.fail("still intercepted"))
    private.end_interception(loop)
    loop.validate(TinyModel(), loader())


def test_logger_step() -> None:
    class Steps(DummyLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            theirs.append(step)

    theirs: list[int | None] = []
    ours: list[int] = []
    in_training(
        lambda trainer: ours.append(private.logger_step(trainer)),
        logger=Steps(),
        log_every_n_steps=1,
        accumulate_grad_batches=2,
    )
    assert sorted(set(ours)) == sorted(set(theirs)), "Lightning gives its loggers other steps now"


def test_validates_by_time() -> None:
    assert not private.validates_by_time(make_trainer())
    assert private.validates_by_time(make_trainer(val_check_interval=timedelta(minutes=1))), (
        "Lightning says it otherwise"
    )


def test_mark_sigterm() -> None:
    with pytest.raises(SIGTERMException):
        in_training(private.mark_sigterm)


def test_time_is_up() -> None:
    timer = Timer(duration=timedelta(hours=1))
    trainer = make_trainer(timer)
    assert not private.time_is_up(trainer)
    timer.load_state_dict({"time_elapsed": {"train": 7200.0}})
    assert private.time_is_up(trainer)


def test_training_data() -> None:
    """The methods that it replaces, and that Lightning still calls each of them; see ``test_resume_data``."""
    called: set[str] = set()

    class Watched(TrainingData):
        def __init__(self, trainer: pl.Trainer) -> None:
            super().__init__(trainer)
            for loop in (trainer.fit_loop, trainer.fit_loop.epoch_loop):
                for name, method in list(vars(loop).items()):
                    if getattr(method, "__self__", None) is self:
                        assert callable(getattr(type(loop), name)), f"Lightning's loops have no {name} any more"
                        setattr(loop, name, partial(self.note, name, method))

        def note(self, name: str, method: Any, *args: Any) -> Any:
            called.add(name)
            return method(*args)

    trainer = make_trainer(max_epochs=2, enable_checkpointing=False)
    Watched(trainer)
    trainer.fit(TinyModel(), loader())
    state = trainer.fit_loop.state_dict()
    trainer.fit_loop.load_state_dict(state)
    names = {"on_save_checkpoint", "on_load_checkpoint", "_load_combined_loader_states"}
    assert called == names | {"reset", "on_run_start", "_on_before_fetch"}


# -- a resumed fit -----------------------------------------------------------------------------------------------------


def test_the_words_by_which_lightning_knows_where_it_resumes() -> None:
    """What they do is tested in ``test_progress.py``."""
    assert training_epoch_loop.RestartStage.RESTARTED_ON_LAST == "restarted_on_last"
    assert training_epoch_loop.RestartStage.RESTARTED_ON_TRAIN_BATCH_END == "restarted_on_train_batch_end"
    assert evaluation_loop.RestartStage.RESTARTED_MID_EVALUATION == "restarted_mid_evaluation"


def test_what_a_logged_value_is_known_by() -> None:
    known = {field.name for field in dataclasses.fields(_Metadata)}
    assert known == {*results._PLAIN, "reduce_fx", "_sync"}


@pytest.mark.parametrize("reduce_fx", ["mean", "max", "min", "sum"])
def test_results(reduce_fx: Any) -> None:
    """What an epoch has gathered goes on in another process, where it may be logged in another way."""

    class Logs(TinyModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss, on_step=False, on_epoch=True, reduce_fx=reduce_fx, prog_bar=self.shows)
            return loss

    class HandOver(Callback):
        given: Any = None

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            epoch = trainer.fit_loop.epoch_loop._results
            if trainer.global_step == 3:
                self.given = results.results(trainer)
                epoch.clear()
                results.set_results(trainer, self.given)
                module.shows = True

    ends = []
    for callbacks in ([HandOver()], []):
        model = Logs()
        model.shows = False  # type: ignore[assignment]
        trainer = make_trainer(*callbacks, max_epochs=1, enable_checkpointing=False)
        trainer.fit(model, loader())
        ends.append(trainer.callback_metrics["loss"])
    assert torch.equal(*ends)
