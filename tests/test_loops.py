"""Loops of Accelerate in one process: saved, cut short, resumed; and what is refused."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import loop_runs
import pytest
import torch
from helpers import TinyModel, assert_blocks_as_lived, assert_same, fit, loader, make_trainer, saver
from loop_runs import WAYS, Loop, Net, train
from safetensors.torch import load_file
from test_cli import Command

from lightning_scar import SCARAccelerator, SCARCheckpointIO, SCARLoop, load
from lightning_scar.core.compatibility import ModelMismatchError
from lightning_scar.core.restoration import restore
from lightning_scar.storage.store import DeltaStore

PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "objects", "global_step")


def of(checkpoint: dict[str, Any], *more: str) -> dict[str, Any]:
    return {part: checkpoint[part] for part in (*PARTS, *more)}


def assert_done(*loops: Loop) -> None:
    for loop in loops:
        assert loop.error is None, loop.error


def test_nothing_of_lightning_is_imported() -> None:
    program = (
        "import sys; from lightning_scar import SCARAccelerator, SCARLoop; "
        "assert not {'lightning', 'pytorch_lightning', 'lightning_fabric'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", [way for way in WAYS if way not in loop_runs.SPECIAL])
@pytest.mark.parametrize("after", [5, 16, 23])
def test_a_resumed_loop_ends_as_an_uninterrupted_one(way: str, after: int, tmp_path: Path) -> None:
    whole = train(0, tmp_path / "whole", way=way)
    first = train(0, tmp_path / "cut", way=way, after=after)
    second = train(0, tmp_path / "cut", way=way)
    assert_done(whole, first, second)
    # With accumulation it goes on behind the last whole step.
    done = len(whole.seen) - len(second.seen)
    assert after - 2 <= done <= after
    assert first.seen[:done] + second.seen == whole.seen
    assert_same(of(second.final), of(whole.final))


def test_random_numbers_go_on_at_an_epochs_end(tmp_path: Path) -> None:
    """In the middle of one, the loader draws a number more when it is begun anew."""
    whole = train(0, tmp_path / "whole", way="random numbers")
    train(0, tmp_path / "cut", way="random numbers", after=16)
    second = train(0, tmp_path / "cut", way="random numbers")
    assert_same(of(second.final, "random"), of(whole.final, "random"))


def test_blocks_are_as_they_were_at_their_steps(tmp_path: Path) -> None:
    options = {"fraction": 0.3, "block_size": 64, "full_every_n_saves": None}
    loop = train(0, tmp_path, after=20, way="an average of the weights", scar=options)
    assert_done(loop)
    assert len(assert_blocks_as_lived(tmp_path, loop.live)) > 1


def test_a_finished_loop_started_again_is_loaded_and_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = train(0, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    capfd.readouterr()
    for _ in range(2):
        again = train(0, tmp_path)
        assert_done(again)
        assert (again.seen, again.live) == ([], {})
        assert_same(of(again.final, "random"), of(first.final, "random"))
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"lightning-scar: {tmp_path} holds a finished run: step 32, ")
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before


def test_a_finished_loop_trains_on_and_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = train(0, tmp_path / "whole", epochs=3)
    first = train(0, tmp_path / "cut")
    capfd.readouterr()
    second = train(0, tmp_path / "cut", epochs=3)
    assert first.seen + second.seen == whole.seen
    assert_same(of(second.final), of(whole.final))
    assert f"lightning-scar: the finished run in {tmp_path / 'cut'} trains on\n" in capfd.readouterr().err
    assert_same(of(load(tmp_path / "cut")), of(load(tmp_path / "whole")))


def test_a_loop_that_ended_early_can_stay_finished(tmp_path: Path) -> None:
    accelerator, model, optimizer, _ = small(tmp_path)
    for begins_finished in (False, True):
        with SCARAccelerator(accelerator, tmp_path / "scar", every_n_steps=2) as scar:
            done = scar.resume()
            assert (scar.finished, done) == (begins_finished, 3 * begins_finished)
            while not scar.finished and scar.steps < 3:
                step(accelerator, model, optimizer)
                scar.step()
            assert scar.finished == begins_finished
        assert scar.finished


# -- what is beside it ---------------------------------------------------------------------------------------------


def small(tmp_path: Path, **options: Any) -> tuple[Any, Any, Any, SCARAccelerator]:
    """An accelerator with one model and optimizer."""
    accelerator = loop_runs.seedable()
    model = Net()
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.01))
    scar = SCARAccelerator(accelerator, tmp_path / "scar", **{"every_n_steps": 2, **options})
    return accelerator, model, optimizer, scar


def step(accelerator: Any, model: Any, optimizer: Any) -> None:
    accelerator.backward(model(torch.ones(2, 8)).square().sum())
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("steps", [0, 3])
def test_save_state_and_load_state_work_beside_it(tmp_path: Path, steps: int) -> None:
    accelerator, model, optimizer, scar = small(tmp_path)
    ema = loop_runs.Ema(model)
    accelerator.register_for_checkpointing(ema)
    with scar:
        scar.resume()
        for _ in range(steps):
            step(accelerator, model, optimizer)
            scar.step()
        accelerator.save_state(str(tmp_path / "state"))
        saved = {name: value.clone() for name, value in model.state_dict().items()}
        step(accelerator, model, optimizer)
        scar.step()
        accelerator.load_state(str(tmp_path / "state"))
        assert_same(dict(model.state_dict()), saved)
        step(accelerator, model, optimizer)
        scar.step()
    assert_same(load(tmp_path / "scar")["state_dict"], dict(model.state_dict()))


def test_a_folder_of_save_state_is_an_ordinary_one(tmp_path: Path) -> None:
    accelerator, model, *_ = small(tmp_path)
    accelerator.save_state(str(tmp_path / "state"))
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    other = loop_runs.accelerator()
    model = Net(width=32)
    model, _ = other.prepare(model, torch.optim.Adam(model.parameters()))
    torch.nn.init.zeros_(model.net[0].weight)
    other.load_state(str(tmp_path / "state"))
    assert_same(dict(model.state_dict()), saved)


# -- one format ----------------------------------------------------------------------------------------------------


def test_a_trainers_and_a_loops_running_checkpoints_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inspect, verify and export read both, and weights go from one to the other."""
    command = Command(monkeypatch, capsys)
    module = fit(saver(tmp_path / "trainer"))
    loop = train(0, tmp_path / "loop")
    assert_done(loop)
    for name, steps in (("trainer", 16), ("loop", 32)):
        assert command("verify", tmp_path / name).returncode == 0
        assert command("inspect", tmp_path / name).returncode == 0
        assert command("export", tmp_path / name, tmp_path / f"{name}.safetensors").returncode == 0
        assert command("export", tmp_path / name, tmp_path / f"{name}.ckpt").returncode == 0
        assert torch.load(tmp_path / f"{name}.ckpt", weights_only=False)["global_step"] == steps
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("loop", "trainer"))
    assert {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in theirs.items()}
    net = Net()
    net.load_state_dict(load(tmp_path / "trainer")["state_dict"])
    assert_same(dict(net.state_dict()), dict(module.state_dict()))
    module.load_state_dict(load(tmp_path / "loop")["state_dict"])
    assert_same(dict(module.state_dict()), loop.final["state_dict"])
    other = TinyModel()
    tester = make_trainer(plugins=[SCARCheckpointIO()])
    tester.test(other, loader(), ckpt_path=str(tmp_path / "loop"))
    assert_same(dict(other.state_dict()), loop.final["state_dict"])
    groups = [
        {(group.name, tuple(slot.name for slot in group.slots)) for group in restore(DeltaStore(folder)).map.groups}
        for folder in (tmp_path / "trainer", tmp_path / "loop")
    ]
    assert groups[0] == groups[1]


def test_each_front_door_refuses_to_resume_the_others_run(tmp_path: Path) -> None:
    fit(saver(tmp_path / "trainer"))
    train(0, tmp_path / "loop", after=3)
    loop = train(0, tmp_path / "trainer")
    assert loop.error is not None
    assert "was written by a Trainer, so a loop cannot resume from it" in loop.error[1]
    with pytest.raises(ModelMismatchError, match="was written by a loop"):
        fit(saver(tmp_path / "loop"))
    # Nothing was lost by it.
    assert load(tmp_path / "loop")["global_step"] == 3
    assert load(tmp_path / "trainer")["global_step"] == 16


# -- found by looking for trouble ------------------------------------------------------------------------------------


def test_a_run_that_fails_between_micro_batches_goes_on_behind_its_last_step(tmp_path: Path) -> None:
    """The gradients of the first ones are in no checkpoint."""
    whole = train(0, tmp_path / "whole", way="accumulated gradients")
    train(0, tmp_path / "cut", way="accumulated gradients", after=8, scar={"save_on_exception": True})
    assert load(tmp_path / "cut")["loop"]["batches"] == 6
    resumed = train(0, tmp_path / "cut", way="accumulated gradients")
    assert_same(of(resumed.final), of(whole.final))


@pytest.mark.parametrize("how", ["free_memory", "another model"])
def test_what_is_saved_is_what_there_was_at_resume(tmp_path: Path, how: str) -> None:
    accelerator, model, optimizer, scar = small(tmp_path)
    with scar:
        scar.resume()
        step(accelerator, model, optimizer)
        scar.step()
        if how == "free_memory":
            accelerator.free_memory()
        else:
            accelerator.prepare(torch.nn.Linear(3, 3))
    assert list(load(tmp_path / "scar")["state_dict"]) == list(model.state_dict())


def test_a_lookahead_is_saved_with_its_own_state(tmp_path: Path) -> None:
    class Lookahead(torch.optim.SGD):
        """Has an optimizer of its own inside."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            super().__init__(optimizer.param_groups[0]["params"], lr=0.1, momentum=0.9)
            self.optimizer = optimizer

    model = Net()
    optimizer = Lookahead(torch.optim.Adam(model.parameters()))
    with SCARLoop(tmp_path, {"model": model, "optimizer": optimizer}, every_n_steps=1) as scar:
        scar.resume()
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        scar.step()
    assert scar.steps == 1
    assert set(load(tmp_path)["optimizer_states"][0]["state"][0]) == {"momentum_buffer"}


def test_a_last_save_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    class Broken(loop_runs.Ema):
        def state_dict(self) -> dict[str, Any]:
            raise RuntimeError("no state to be had")

    model = Net()
    state: dict[str, Any] = {"model": model, "optimizer": torch.optim.Adam(model.parameters())}

    def fail() -> None:
        with SCARLoop(tmp_path, {**state, "ema": Broken(model)}, every_n_steps=1) as scar:
            scar.resume()
            scar.state.steps = 1
            raise KeyError

    with pytest.warns(UserWarning, match="the last save failed, too: RuntimeError"):  # noqa: SIM117
        with pytest.raises(KeyError):
            fail()
    with SCARLoop(tmp_path, state, every_n_steps=1) as scar:
        assert scar.resume() == 0


def test_a_sigterm_behind_the_last_step_is_not_swallowed(tmp_path: Path) -> None:
    called: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda signum, frame: called.append(signum))
    try:
        accelerator, model, optimizer, scar = small(tmp_path)
        with scar:
            scar.resume()
            step(accelerator, model, optimizer)
            scar.step()
            signal.raise_signal(signal.SIGTERM)
            assert called == []
        assert called == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_whoever_handles_sigterm_himself_may_go_on(tmp_path: Path) -> None:
    called: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda signum, frame: called.append(signum))
    try:
        accelerator, model, optimizer, scar = small(tmp_path, every_n_steps=100)
        with scar:
            scar.resume()
            signal.raise_signal(signal.SIGTERM)
            for i in range(1, 4):
                step(accelerator, model, optimizer)
                scar.step()
                assert called == [signal.SIGTERM]
                assert load(tmp_path / "scar")["global_step"] == 1, "it was saved once, before the handler was called"
                assert scar.steps == i
    finally:
        signal.signal(signal.SIGTERM, previous)
