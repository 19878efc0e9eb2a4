"""Running checkpoints through ``SCARCheckpointIO``; everything else as if it were not there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyModel, assert_blocks_as_lived, assert_same, cut_short, files, fit, loader, make_trainer, saver
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO
from zoo import WithValidation

from lightning_scar import SCARCheckpoint, SCARCheckpointIO, load
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.running_checkpoint import RunningCheckpoint

PLAIN = {
    "the default": lambda: SCARCheckpointIO(),
    "TorchCheckpointIO": lambda: SCARCheckpointIO(TorchCheckpointIO()),
    "AsyncCheckpointIO": lambda: SCARCheckpointIO(AsyncCheckpointIO(TorchCheckpointIO())),
    "AsyncCheckpointIO without a base": lambda: SCARCheckpointIO(AsyncCheckpointIO()),
}


class Spy(CheckpointIO):
    """Notes how it is called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(("save", args, kwargs))

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.calls.append(("load", args, kwargs))
        return {}

    def remove_checkpoint(self, *args: Any) -> None:
        self.calls.append(("remove", args))

    def teardown(self) -> None:
        self.calls.append("teardown")


def a_checkpoint() -> dict[str, Any]:
    return {"state_dict": {"w": torch.randn(7, 3)}, "global_step": 3, "extra": [1, "two", None]}


@pytest.mark.parametrize("io", PLAIN)
def test_plain_files_are_those_of_the_wrapped_io(io: str, tmp_path: Path) -> None:
    checkpoint, ours = a_checkpoint(), PLAIN[io]()
    TorchCheckpointIO().save_checkpoint(checkpoint, tmp_path / "theirs" / "a.ckpt")
    ours.save_checkpoint(checkpoint, tmp_path / "ours" / "a.ckpt")
    ours.teardown()
    assert (tmp_path / "ours" / "a.ckpt").read_bytes() == (tmp_path / "theirs" / "a.ckpt").read_bytes()
    assert_same(PLAIN[io]().load_checkpoint(tmp_path / "theirs" / "a.ckpt"), checkpoint)
    ours.remove_checkpoint(tmp_path / "ours" / "a.ckpt")
    assert files(tmp_path) == ["theirs/a.ckpt"]


def test_arguments_for_plain_files_reach_the_wrapped_io(tmp_path: Path) -> None:
    spy, path = Spy(), tmp_path / "a.ckpt"
    io, checkpoint = SCARCheckpointIO(spy), a_checkpoint()
    io.save_checkpoint(checkpoint, path, storage_options={"x": 1})
    io.load_checkpoint(path)
    io.load_checkpoint(path, map_location="meta", weights_only=True)
    io.remove_checkpoint(path)
    io.teardown()
    assert spy.calls == [
        ("save", (checkpoint, path), {"storage_options": {"x": 1}}),
        ("load", (path,), {}),
        ("load", (path,), {"map_location": "meta", "weights_only": True}),
        ("remove", (path,)),
        "teardown",
    ]


@pytest.mark.parametrize("io", PLAIN)
def test_model_checkpoints_best_are_kept_as_ever(io: str, tmp_path: Path) -> None:
    def kept(folder: Path, **options: Any) -> dict[str, Any]:
        best = ModelCheckpoint(folder, filename="{step}", monitor="val_loss", save_top_k=2, save_last=True)
        make_trainer(best, max_epochs=4, **options).fit(TinyModel(), datamodule=WithValidation())
        return {name: torch.load(folder / name)["state_dict"] for name in files(folder)}

    plain, ours = kept(tmp_path / "plain"), kept(tmp_path / "ours", plugins=[PLAIN[io]()])
    assert len(plain) == 3
    assert_same(ours, plain)


def test_a_missing_plain_file_is_the_wrapped_ios_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SCARCheckpointIO().load_checkpoint(tmp_path / "missing.ckpt")


def test_a_directory_is_a_running_checkpoint(tmp_path: Path) -> None:
    io, checkpoint = SCARCheckpointIO(), a_checkpoint()
    io.save_checkpoint(checkpoint, tmp_path / "scar")
    checkpoint["state_dict"]["w"].add_(1)
    checkpoint["global_step"] = 4
    io.save_checkpoint(checkpoint, tmp_path / "scar")
    io.teardown()
    assert_same(SCARCheckpointIO().load_checkpoint(tmp_path / "scar"), checkpoint)
    io.remove_checkpoint(tmp_path / "scar")
    assert not (tmp_path / "scar").exists()


def test_map_location_moves_a_running_checkpoint(tmp_path: Path) -> None:
    io = SCARCheckpointIO()
    io.save_checkpoint(a_checkpoint(), tmp_path / "scar")
    io.teardown()
    assert io.load_checkpoint(tmp_path / "scar", map_location="meta")["state_dict"]["w"].is_meta


def test_mutation_right_after_a_save_does_not_leak_into_it(tmp_path: Path) -> None:
    io, checkpoint = SCARCheckpointIO(), a_checkpoint()
    before = checkpoint["state_dict"]["w"].clone()
    io.save_checkpoint(checkpoint, tmp_path / "scar")
    checkpoint["state_dict"]["w"].zero_()
    io.teardown()
    assert torch.equal(load(tmp_path / "scar")["state_dict"]["w"], before)


def test_save_checkpoint_of_a_trainer_takes_both_kinds_of_path(tmp_path: Path) -> None:
    loop = make_trainer(plugins=[SCARCheckpointIO()], max_epochs=1, enable_checkpointing=False)
    model = TinyModel()
    loop.fit(model, loader())
    loop.save_checkpoint(tmp_path / "scar")
    loop.save_checkpoint(tmp_path / "plain.ckpt")
    loop.strategy.checkpoint_io.teardown()
    assert_same(load(tmp_path / "scar"), torch.load(tmp_path / "plain.ckpt"))


def test_save_checkpoint_into_the_callbacks_directory_joins_its_saves(tmp_path: Path) -> None:
    class Saves(TinyModel):
        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            if self.global_step in (2, 6):
                self.trainer.save_checkpoint(tmp_path)

    model = Saves()
    cut_short(saver(tmp_path, every_n_train_steps=4), after=7, model=model)
    assert load(tmp_path)["global_step"] == 6
    assert_blocks_as_lived(tmp_path, model.live)


def test_the_callback_wraps_what_the_user_chose(tmp_path: Path) -> None:
    theirs = AsyncCheckpointIO(TorchCheckpointIO())
    loop = make_trainer(saver(tmp_path), plugins=[theirs], max_epochs=1)
    loop.fit(TinyModel(), loader())
    installed = loop.strategy.checkpoint_io
    assert isinstance(installed, SCARCheckpointIO)
    assert installed.checkpoint_io is theirs
    loop.test(TinyModel(), loader())
    assert loop.strategy.checkpoint_io is installed


def test_the_callback_uses_the_users_plugin(tmp_path: Path) -> None:
    io = SCARCheckpointIO()
    loop = make_trainer(saver(tmp_path), plugins=[io], max_epochs=1)
    loop.fit(TinyModel(), loader())
    assert loop.strategy.checkpoint_io is io
    assert load(tmp_path)["global_step"] == 8


# -- other file systems --------------------------------------------------------------------------------------------


def test_a_run_lives_in_memory(memory_url: str) -> None:
    model = cut_short(saver(memory_url, fraction=0.3, block_size=64), after=6)
    assert_blocks_as_lived(memory_url, model.live)
    fit(saver(memory_url))
    assert load(memory_url)["global_step"] == 16


def test_a_run_lives_on_s3(s3_url: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"endpoint_url": s3_server, "key": "testing", "secret": "testing"}
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)  # what leads there are the options

    def scar(**more: Any) -> SCARCheckpoint:
        return saver(f"{s3_url}/scar", storage_options=options, full_every_n_saves=1, **more)

    model = cut_short(scar(), after=3)
    saved = load(f"{s3_url}/scar", storage_options=options)
    assert_same(saved["state_dict"], model.live[3]["state_dict"])
    resumed = fit(scar(), max_epochs=1)
    assert min(resumed.live) == 4
    loop = make_trainer(scar())
    loop.validate(TinyModel(), loader(), ckpt_path=f"{s3_url}/scar")


def test_plain_files_stay_local_while_the_run_lives_elsewhere(memory_url: str, tmp_path: Path) -> None:
    fit(saver(memory_url), ModelCheckpoint(tmp_path, filename="plain", every_n_train_steps=8))
    assert [name for name in files(tmp_path) if name.startswith("plain")]
    assert load(memory_url)["global_step"] == 16


def test_one_rank_alone_does_not_save_to_what_all_ranks_save_to(memory_url: str) -> None:
    with RunningCheckpoint(memory_url) as running:
        io = SCARCheckpointIO()
        io.attach(running)
        running.ranks = Ranks(rank=0, world_size=2)
        with pytest.raises(ValueError, match=r"all 2 ranks save to .*use another path"):
            io.save_checkpoint({"state_dict": {}}, memory_url)
