"""Copies, by pickle or by hand, of what saves: whatever the moment, a copy has the same options and does not run."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import loop_runs
import pytest
import scar_ddp_runs
import torch
import torch.distributed as dist
from helpers import TinyModel, assert_same, cut_short, fit, loader, saver
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import nn
from torch.utils.data import default_collate

from lightning_scar import (
    SCARAccelerator,
    SCARCheckpoint,
    SCARCheckpointIO,
    SCARContinuation,
    SCARDDPStrategy,
    SCARLoop,
    load,
)
from lightning_scar.core.selection import distance

EXACT: dict[str, Any] = {"fraction": 1.0, "full_every_n_saves": 1}

#: The two ways to copy; the second leaves nothing shared by chance.
COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda it: pickle.loads(pickle.dumps(it)),
    "deepcopy": copy.deepcopy,
}
a_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


class Quiet(TinyModel):
    """Remembers nothing, so that copies of a Trainer are small."""

    def on_train_batch_end(self, *args: Any) -> None: ...


class Data(pl.LightningDataModule):
    """Collates with a method of its own, and so with the Trainer, which it knows."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def collate(self, items: list[Any]) -> Any:
        return default_collate(items)

    def train_dataloader(self) -> Any:
        return loader(collate_fn=self.collate, **self.options)

    def val_dataloader(self) -> Any:
        return loader(2, collate_fn=self.collate, **self.options)


class At(Callback):
    """Does something in the middle of a fit: in a batch, with a save under way."""

    def __init__(self, do: Callable[[pl.Trainer], Any], after: int = 4) -> None:
        self.do = do
        self.after = after
        self.done: Any = None

    def on_before_backward(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.after and self.done is None:
            self.done = self.do(trainer)

    def __getstate__(self) -> dict[str, Any]:
        return {}


def assert_not_running(scar: SCARCheckpoint, like: SCARCheckpoint) -> None:
    assert type(scar) is type(like)
    assert vars(scar).keys() == vars(like).keys()
    assert scar._options == like._options
    assert scar.dirpath == like.dirpath
    assert scar._running is None
    assert scar._io is None
    assert scar.stats.saves == 0
    assert scar._schedule is not like._schedule


@a_copy
def test_copies_before_during_and_after(copied: Any, tmp_path: Path) -> None:
    scar = saver(tmp_path, policy=distance, heal_non_finite=True, **EXACT)
    threads: list[int] = []

    def in_the_middle(trainer: pl.Trainer) -> list[Any]:
        assert scar._running is not None
        before = threading.active_count()
        found = [copied(it) for it in (scar, trainer.strategy.checkpoint_io, trainer.strategy, trainer.datamodule)]  # type: ignore[attr-defined]
        found.append(copied(trainer))
        threads.append(threading.active_count() - before)
        return found

    assert_not_running(copied(scar), scar)
    at = At(in_the_middle)
    data = Data()
    model = fit(scar, at, model=Quiet(), data=data, max_epochs=1)
    own, io, strategy, module, trainer = at.done
    assert threads == [0]
    for each in (own, *module.trainer.checkpoint_callbacks, *trainer.checkpoint_callbacks):
        assert_not_running(each, scar)
    for each in (io, strategy.checkpoint_io, trainer.strategy.checkpoint_io):
        assert isinstance(each, SCARCheckpointIO)
        assert not each._attached
    assert_not_running(copied(scar), scar)
    assert_not_running(copied(model.trainer).checkpoint_callback, scar)
    copied(data)
    assert_same(SCARCheckpointIO().load_checkpoint(tmp_path)["state_dict"], model.state_dict())


@a_copy
def test_a_copy_from_the_middle_trains(copied: Any, tmp_path: Path) -> None:
    """The callback takes the run up; the Trainer makes one of its own."""
    at = At(lambda trainer: copied([trainer, trainer.checkpoint_callback]))
    whole = fit(saver(tmp_path / "whole"), model=Quiet(), max_epochs=2)
    cut_short(saver(tmp_path / "cut", **EXACT), at, after=8, model=Quiet())
    trainer, scar = at.done
    resumed = fit(scar, model=Quiet(), max_epochs=2)
    assert len(resumed.seen) == 8
    assert_same(list(resumed.state_dict().values()), list(whole.state_dict().values()))
    trainer.checkpoint_callback.dirpath = str(tmp_path / "another")
    trainer.fit_loop.epoch_loop.reset()
    trainer.validate(Quiet(), Data(), verbose=False)
    assert not (tmp_path / "another").exists()


class Wrapping(SCARCheckpointIO): ...


def test_an_io_that_has_opened_a_directory(tmp_path: Path) -> None:
    io = Wrapping()
    io.save_checkpoint({"state_dict": {"a": torch.ones(2)}, "global_step": 1}, tmp_path / "scar")
    for copied in COPIES.values():
        other = copied(io)
        assert type(other) is Wrapping
        assert not other._opened
        other.teardown()
    io.save_checkpoint({"state_dict": {"a": torch.zeros(2)}, "global_step": 2}, tmp_path / "scar")
    io.teardown()
    assert io.load_checkpoint(tmp_path / "scar")["global_step"] == 2


@a_copy
def test_a_subclass_keeps_what_it_has_of_its_own(copied: Any, tmp_path: Path) -> None:
    scar = Tagged(tmp_path, tag="mine", every_n_train_steps=3)
    found = copied(scar)
    assert found.tag == "mine"
    assert found._schedule == scar._schedule


class Tagged(SCARCheckpoint):
    def __init__(self, dirpath: Any, tag: str, **options: Any) -> None:
        super().__init__(dirpath, **options)
        self.tag = tag


@pytest.fixture
def own_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What Lightning leaves of a group is gone afterwards."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    dist.destroy_process_group()


@a_copy
@pytest.mark.usefixtures("own_group")
def test_a_copied_strategy_is_in_no_group(copied: Any, tmp_path: Path) -> None:
    at = At(lambda trainer: copied(trainer))
    strategy = SCARDDPStrategy(cluster_environment=_Launched(), on_failure="wait")
    with pytest.warns(UserWarning, match="without lightning-scar's supervisor"):
        fit(saver(tmp_path), at, model=Quiet(), data=Data(), max_epochs=1, strategy=strategy)
    found = at.done.strategy
    assert found._policy == strategy._policy
    assert found.model is found.lightning_module
    assert found.outages == []


class _Launched(LightningEnvironment):
    """As if something else had started this process, the only one."""

    @property
    def creates_processes_externally(self) -> bool:
        return True


@a_copy
def test_copies_of_loops(copied: Any, tmp_path: Path) -> None:
    def check(scar: Any, found: Any) -> None:
        assert type(found) is type(scar)
        assert found._options == scar._options
        assert (found.batches_done, found.steps, found.stats.saves) == (0, 0, 0)
        with pytest.raises(RuntimeError, match=r"call resume\(\) once"):
            found.step()

    accelerator = loop_runs.accelerator()
    model = nn.Linear(8, 1)
    model, optimizer, data = accelerator.prepare(model, torch.optim.Adam(model.parameters()), loader())
    plain = nn.Linear(8, 1)
    state = {"model": plain, "optimizer": torch.optim.Adam(plain.parameters())}
    with pytest.warns(UserWarning, match="without lightning-scar's supervisor"):
        continuation = SCARContinuation(on_failure="wait")
    loops: list[tuple[Any, Any, Any]] = [
        (SCARLoop(tmp_path / "plain", state, every_n_steps=2, continuation=continuation), plain, state["optimizer"]),
        (SCARAccelerator(accelerator, tmp_path / "accelerate", every_n_steps=2, **EXACT), model, optimizer),
    ]
    for scar, model, optimizer in loops:
        check(scar, copied(scar))
        with scar:
            scar.resume()
            for batch, _ in data:
                model(batch).square().mean().backward()
                optimizer.step()
                scar.step()
            # A loader of Accelerate cannot be pickled while it is iterated.
            found = copied(scar)
        check(scar, found)
        check(scar, copied(scar))
        with found:
            assert found.resume() == 8
            weights = found.state.parts.modules.values()
            assert_same([list(each.parameters()) for each in weights], [list(model.parameters())])


# -- processes of their own ----------------------------------------------------------------------------------------


def test_spawned_loader_workers_get_the_trainer(tmp_path: Path) -> None:
    data = Data(num_workers=1, multiprocessing_context="spawn")
    scar = saver(tmp_path, **EXACT)
    model = fit(scar, model=Quiet(), data=data, max_epochs=1, limit_val_batches=0)
    assert model.trainer.global_step == 8
    assert scar.stats.saves > 1


@pytest.mark.slow
def test_spawned_loader_workers_get_the_trainer_of_a_group(tmp_path: Path) -> None:
    """And go on when a worker dies: the others' data are pickled again."""
    run = scar_ddp_runs.train(
        tmp_path,
        ("training_step", 4, 1, "kill"),
        data={"process": "spawn"},
        trainer={"max_epochs": 2, "limit_val_batches": 0},
        scar={"every_n_train_steps": 2},
        real=True,
    )
    assert run.code == 0, run.console
    assert [len(run.outages(rank)) for rank in (0, 1)] == [1, 1]


@pytest.mark.slow
def test_a_launcher_that_spawns_its_processes(tmp_path: Path) -> None:
    scar = saver(tmp_path, **EXACT)
    model = fit(scar, model=Quiet(), max_epochs=1, strategy="ddp_spawn", devices=2)
    assert load(tmp_path)["global_step"] == 4
    assert_same(load(tmp_path)["state_dict"], dict(model.state_dict()))
    assert scar.best_model_path == str(tmp_path)
