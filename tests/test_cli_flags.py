"""Everything is settable from LightningCLI's flags and YAML."""

import inspect
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from helpers import Stopped, TinyModel, loader
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import LightningCLI

from lightning_scar import SCARCheckpoint, load
from lightning_scar.core.selection import round_robin

OPTIONS: dict[str, Any] = {
    "dirpath": "runs/a",
    "every_n_train_steps": 7,
    "fraction": 0.25,
    "refresh": None,
    "policy": "round_robin",
    "block_size": 4096,
    "max_age": 50,
    "full_every_n_saves": 10,
    "staging": "eager",
    "resume": False,
    "strict": False,
    "save_on_exception": False,
    "on_write_error": "raise",
    "heal_non_finite": True,
    "max_heals": 7,
    "memory": True,
    "durable_every_n_saves": 3,
    "replicas": 2,
    "memory_limit": 1_000_000_000,
    "storage_options": {"anon": True},
}
WITHOUT_INTERVAL = {key: value for key, value in OPTIONS.items() if key != "every_n_train_steps"}
OTHER_INTERVALS: list[dict[str, Any]] = [
    WITHOUT_INTERVAL | {"train_time_interval": timedelta(minutes=2, seconds=5.5)},
    WITHOUT_INTERVAL | {"train_time_interval": timedelta(days=1, hours=2)},
    WITHOUT_INTERVAL | {"max_overhead": 0.02},
    WITHOUT_INTERVAL,
]


class Model(TinyModel):
    """With a constructor that a parser understands."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()


def cli(*arguments: str, run: bool = False) -> LightningCLI:
    return LightningCLI(Model, Data, args=list(arguments), run=run, save_config_callback=None)


def ours(parsed: LightningCLI) -> SCARCheckpoint:
    (callback,) = [c for c in parsed.trainer.callbacks if isinstance(c, SCARCheckpoint)]  # type: ignore[attr-defined]
    return callback


def word(value: Any) -> str:
    """As one would type it."""
    if isinstance(value, timedelta):
        return str(value)
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("...").strip()


def flags(options: dict[str, Any]) -> list[str]:
    values = (f"--trainer.callbacks.{key}={word(value)}" for key, value in options.items())
    return [
        "--trainer.callbacks+=lightning_scar.SCARCheckpoint",
        *values,
    ]


def config(path: Path, options: dict[str, Any]) -> str:
    values = {key: str(value) if isinstance(value, timedelta) else value for key, value in options.items()}
    callback = {"class_path": "lightning_scar.SCARCheckpoint", "init_args": values}
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    return f"--config={path}"


def test_every_option_of_the_constructor_is_tried_here() -> None:
    names = OPTIONS.keys() | {name for options in OTHER_INTERVALS for name in options}
    assert set(inspect.signature(SCARCheckpoint).parameters) == names
    defaults = vars(SCARCheckpoint("other", every_n_train_steps=1))
    tried = vars(SCARCheckpoint(**OPTIONS))
    same = {name for name in defaults if defaults[name] == tried[name] and name != "stats"}
    assert not same & {f"_{name}" for name in OPTIONS}, "a value that is the default proves nothing"


@pytest.mark.parametrize("options", [OPTIONS, *OTHER_INTERVALS])
def test_every_option_is_set_from_flags(options: dict[str, Any]) -> None:
    assert vars(ours(cli(*flags(options)))) == vars(SCARCheckpoint(**options))


@pytest.mark.parametrize("options", [OPTIONS, *OTHER_INTERVALS])
def test_every_option_is_set_from_yaml(options: dict[str, Any], tmp_path: Path) -> None:
    assert vars(ours(cli(config(tmp_path / "c.yaml", options)))) == vars(SCARCheckpoint(**options))


def test_flags_override_yaml(tmp_path: Path) -> None:
    parsed = cli(config(tmp_path / "c.yaml", OPTIONS), "--trainer.callbacks.fraction=0.5")
    assert vars(ours(parsed)) == vars(SCARCheckpoint(**{**OPTIONS, "fraction": 0.5}))


@pytest.mark.parametrize("options", [OPTIONS, *OTHER_INTERVALS, {"dirpath": "a", "every_n_train_steps": 1}])
def test_print_config_prints_what_can_be_read_back(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli(*flags(options), "--print_config")
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert vars(ours(cli(f"--config={printed}"))) == vars(SCARCheckpoint(**options))


def test_a_policy_of_ones_own_is_named_by_its_path() -> None:
    parsed = cli(
        *flags({"dirpath": "a", "every_n_train_steps": 1}),
        "--trainer.callbacks.policy=lightning_scar.core.selection.round_robin",
    )
    assert ours(parsed)._settings.policy is round_robin


@pytest.mark.parametrize("text", ["0:10:00", "'0:10:00'"])
def test_a_time_is_written_as_hours_minutes_and_seconds(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "trainer:\n  callbacks:\n    - class_path: lightning_scar.SCARCheckpoint\n"
        f"      init_args:\n        dirpath: a\n        train_time_interval: {text}\n"
    )
    assert ours(cli(f"--config={path}"))._schedule.train_time_interval == timedelta(minutes=10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("staging", "later"),
        ("refresh", "often"),
        ("fraction", "much"),
        ("every_n_train_steps", "1.5"),
        ("train_time_interval", "soon"),
        ("max_overhead", "little"),
    ],
)
def test_a_wrong_flag_is_an_error_that_names_it(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"dirpath": "a", name: value}
    with pytest.raises(SystemExit) as end:
        cli(*flags(wrong))
    assert end.value.code == 2
    assert value in capsys.readouterr().err


def test_a_value_out_of_range_is_an_error_too() -> None:
    with pytest.raises(ValueError, match=r"fraction=7\.0 must be in \(0, 1\]"):
        cli(*flags({"dirpath": "a", "every_n_train_steps": 1, "fraction": 7.0}))


@pytest.mark.parametrize(("breaks", "saved"), [(1, None), (5, 5)])
def test_the_same_command_goes_on_beside_the_config_that_it_wrote_itself(
    breaks: int, saved: int | None, tmp_path: Path
) -> None:
    """In a fixed folder, where Lightning would not overwrite it; whether anything was saved or not."""
    options = {"dirpath": str(tmp_path / "scar"), "every_n_train_steps": 2}
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"default_root_dir": str(tmp_path), "max_epochs": 2}
    arguments = ["fit", *flags(options), *(f"--trainer.{key}={word(value)}" for key, value in quiet.items())]

    class Breaks(Model):
        broken = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == breaks and not Breaks.broken:
                Breaks.broken = True
                raise Stopped
            return super().training_step(batch, batch_idx)

        def configure_callbacks(self) -> Any:
            # With these, Lightning sorts all callbacks once more.
            return [Timer()]

    def start(*more: str) -> Any:
        return LightningCLI(Breaks, Data, args=[*arguments, *more])

    with pytest.raises(Stopped):
        start()
    assert (tmp_path / "config.yaml").exists()
    if saved is None:
        shutil.rmtree(tmp_path / "scar")
        (tmp_path / "scar").mkdir()
    resumed = start()
    assert len(resumed.model.seen) == 16 - (saved or 0)
    assert [type(callback).__name__ for callback in resumed.trainer.callbacks][-1] == "SCARCheckpoint"
    assert "_KeepsConfig" not in [type(callback).__name__ for callback in resumed.trainer.callbacks]
    assert start().model.seen == []
    assert len(start("--trainer.max_epochs=3").model.seen) == 8
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["max_epochs"] == 3
    with pytest.raises(RuntimeError, match=r"config\.yaml to NOT exist"):
        start(f"--trainer.callbacks.dirpath={tmp_path / 'other'}")
    with pytest.raises(RuntimeError, match=r"config\.yaml to NOT exist"):
        start("--trainer.callbacks.resume=false")


def test_a_run_from_flags_resumes_and_continues(tmp_path: Path) -> None:
    arguments = [
        "fit",
        *flags({"dirpath": str(tmp_path / "scar"), "every_n_train_steps": 2}),
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]
    cli(*arguments, "--trainer.max_epochs=1", run=True)
    assert load(tmp_path / "scar")["global_step"] == 8
    cli(*arguments, "--trainer.max_epochs=2", f"--ckpt_path={tmp_path / 'scar'}", run=True)
    assert load(tmp_path / "scar")["global_step"] == 16
