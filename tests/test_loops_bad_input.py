"""What loops are refused, and what is said."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import loop_runs
import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from helpers import samples
from loop_runs import Net, train
from torch.utils.data import DataLoader, IterableDataset

from lightning_scar import SCARAccelerator, SCARContinuation, SCARLoop, load
from lightning_scar.core.compatibility import ModelMismatchError
from lightning_scar.core.restoration import NoCheckpointError
from lightning_scar.loops.accelerate import WithAccelerate
from lightning_scar.storage.delta import StorageError


def loop(dirpath: Any, **options: Any) -> SCARLoop:
    model = Net()
    state = {"model": model, "optimizer": torch.optim.Adam(model.parameters())}
    return SCARLoop(dirpath, state, **{"every_n_steps": 1, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train_time_interval": timedelta(seconds=3)},
            r"every_n_steps=1 and train_time_interval=datetime.timedelta\(seconds=3\); give one of them",
        ),
        ({"max_overhead": 0.5}, "every_n_steps=1 and max_overhead=0.5; give one of them"),
        ({"every_n_steps": 0}, "every_n_steps=0 must be None or a whole number of at least 1"),
        ({"every_n_steps": None, "train_time_interval": 3.0}, "train_time_interval=3.0 must be a datetime.timedelta"),
        ({"every_n_steps": None, "max_overhead": 1.0}, r"max_overhead=1.0 must be in \(0, 1\)"),
        ({"full_every_n_saves": -1}, "full_every_n_saves=-1 must be None or a whole number"),
        ({"fraction": 0.0}, r"fraction=0.0 must be in \(0, 1\]"),
        ({"policy": "best"}, "policy='best' must be one of"),
        ({"max_heals": 0}, "max_heals=0 must be at least 1"),
        ({"staging": "slow"}, "staging='slow' must be"),
    ],
)
def test_values_out_of_range(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        SCARAccelerator(loop_runs.accelerator(), tmp_path, **{"every_n_steps": 1, **options})


def test_what_has_no_state(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=re.escape("state['epoch'] is a int, which has no state_dict()")):
        SCARLoop(tmp_path, {"model": Net(), "epoch": 3}, every_n_steps=1)


@pytest.mark.parametrize("name", ["train", "a.b"])
def test_names_that_a_module_cannot_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"state[{name!r}]: torch does not accept this name for a module")):
        SCARLoop(tmp_path, {name: Net(), "other": Net()}, every_n_steps=1)


def test_fsdp_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # Accelerate sets it, and leaves it.
    accelerator = loop_runs.accelerator(fsdp_plugin=FullyShardedDataParallelPlugin())
    with pytest.raises(ValueError, match="does not support FSDP, which shards the state over the processes"):
        SCARAccelerator(accelerator, tmp_path, every_n_steps=1)


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM])
def test_whatever_shards_the_state_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: DistributedType
) -> None:
    """As an accelerator says that has several devices, which there are not here."""
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: kind))
    with pytest.raises(ValueError, match=f"does not support {kind.value}"):
        SCARAccelerator(loop_runs.accelerator(), tmp_path, every_n_steps=1)


def test_steps_before_and_behind(tmp_path: Path) -> None:
    scar = loop(tmp_path)
    for call in (scar.step, lambda: scar.training_step(lambda: None)):
        with pytest.raises(RuntimeError, match=r"call resume\(\) once, before the first step"):
            call()
    scar.close()  # nothing was begun
    scar.resume()
    with pytest.raises(RuntimeError, match=r"resume\(\) was called before"):
        scar.resume()
    scar.close()
    scar.close()
    with pytest.raises(RuntimeError, match=r"nothing after close\(\)"):
        scar.step()


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no optimizer to save; put it into `state`"):
        SCARLoop(tmp_path, {"model": Net()}, every_n_steps=1).resume()
    with pytest.raises(ValueError, match=r"there is no model to save; call resume\(\) after accelerator.prepare"):
        SCARAccelerator(loop_runs.accelerator(), tmp_path, every_n_steps=1).resume()


def test_a_continuation_of_what_was_prepared_before(tmp_path: Path) -> None:
    accelerator = loop_runs.accelerator()
    framework = WithAccelerate(accelerator)
    framework.check_beginning()
    accelerator.prepare(DataLoader(samples(), batch_size=4))
    with pytest.raises(ValueError, match=r"create SCARAccelerator before accelerator.prepare\(...\)"):
        framework.check_beginning()


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        yield from torch.ones(8, 2)


def test_extra_batches_are_drawn_from_data_sets_with_a_length(tmp_path: Path) -> None:
    accelerator = loop_runs.accelerator()
    framework = WithAccelerate(accelerator)
    assert framework.extra_batches(None, 0) is None
    accelerator.prepare(DataLoader(Stream(), batch_size=4))
    assert framework.extra_batches(None, 0) is None
    framework = WithAccelerate(loop_runs.accelerator())
    framework._accelerator.prepare(DataLoader(samples(2), batch_size=4))
    first, second = framework.extra_batches(None, 0), framework.extra_batches(None, 1)
    assert first is not None
    assert second is not None
    epochs = [torch.cat([next(batches)[0] for _ in range(2)]) for batches in (first, first, second)]
    assert len({float(epoch[0, 0]) for epoch in epochs}) > 1, "one order for all"
    assert all(torch.allclose(epoch.sum(0), samples(2).tensors[0].sum(0), atol=1e-5) for epoch in epochs)


def test_another_model(tmp_path: Path) -> None:
    train(0, tmp_path, after=3)
    model = Net(width=16)
    state = {"model": model, "optimizer": torch.optim.Adam(model.parameters())}
    with pytest.raises(ModelMismatchError, match=r"reshaped: net.0.weight is \(32, 8\) in the checkpoint, \(16, 8\)"):
        SCARLoop(tmp_path, state, every_n_steps=1).resume()
    with SCARLoop(tmp_path, state, every_n_steps=1, strict=False) as scar:
        with pytest.warns(UserWarning, match="1 of the present one's 4 tensors were loaded"):
            assert scar.resume() == 3
        assert torch.equal(model.net[2].bias, load(tmp_path)["state_dict"]["net.2.bias"])
    assert load(tmp_path)["state_dict"]["net.0.weight"].shape == (16, 8)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"second": torch.optim.SGD([torch.ones(1)], lr=1.0)}, "has 1 optimizers, this training has 2"),
        ({"ema": loop_runs.Ema(Net())}, "has no state of ema, which this training has"),
    ],
)
def test_other_parts(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with loop(tmp_path) as scar:
        scar.resume()
    model = Net()
    state = {"model": model, "optimizer": torch.optim.Adam(model.parameters()), **more}
    with pytest.raises(ModelMismatchError, match=message):
        SCARLoop(tmp_path, state, every_n_steps=1).resume()
    with SCARLoop(tmp_path, state, every_n_steps=1, strict=False) as scar:
        assert scar.resume() == 0


def test_something_else_in_the_directory(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="holds something else than a running checkpoint"):
        loop(tmp_path).resume()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_nothing_but_damaged_files(tmp_path: Path) -> None:
    train(0, tmp_path, after=1)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(NoCheckpointError, match="only damaged files"):
        loop(tmp_path).resume()
    with loop(tmp_path, resume=False) as scar:
        assert scar.resume() == 0
    assert load(tmp_path)["global_step"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_failure": "pray"}, "on_failure='pray' is not one of 'cover', 'shrink', 'buffer', 'wait'"),
        ({"max_staleness": -1}, "max_staleness=-1 must not be negative"),
    ],
)
def test_a_continuation_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SCARContinuation(**options)


def test_without_a_supervisor_a_continuation_makes_plain_steps(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="a worker that dies is not replaced.*lightning-scar run --nproc-per-node N"):
        continuation = SCARContinuation()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}

    def gradients(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with SCARLoop(tmp_path, state, every_n_steps=1, continuation=continuation) as scar:
        scar.resume()
        before = model.net[0].weight.clone()
        assert scar.training_step(gradients, torch.ones(2, 8)) > 0
        scar.step()
    assert not torch.equal(before, model.net[0].weight)
    assert model.net[0].weight.grad is None
    assert schedule.get_last_lr() == [0.05]
    assert (scar.batches_done, scar.steps, continuation.outages) == (1, 1, [])
