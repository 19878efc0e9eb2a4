"""What this package knows of Accelerate's insides, a test for each piece."""

from typing import Any

import loop_runs
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from helpers import samples
from torch import nn
from torch.utils.data import BatchSampler, DataLoader

from lightning_scar.loops import private


def prepared(**options: Any) -> tuple[Any, Any, Any, Any, Any]:
    accelerator = loop_runs.accelerator(**options)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    loader = DataLoader(samples(), batch_size=4, shuffle=True)
    return accelerator, *accelerator.prepare(model, optimizer, schedule, loader)


def test_training_state() -> None:
    accelerator, model, optimizer, schedule, _ = prepared()
    ema = loop_runs.Ema(model)
    accelerator.register_for_checkpointing(ema)
    state = private.training_state(accelerator)
    assert list(state.modules.values()) == [model]
    assert state.optimizers == [optimizer]
    assert state.inner_optimizers == [optimizer.optimizer]
    assert state.schedulers == [schedule]
    assert state.objects == {"custom_0": ema}


def test_the_scaler_is_part_of_it() -> None:
    accelerator, *_ = prepared()
    accelerator.scaler = torch.amp.GradScaler("cpu")
    assert private.training_state(accelerator).objects == {"scaler": accelerator.scaler}


def test_set_sync_gradients() -> None:
    accelerator, *_ = prepared()
    assert accelerator.sync_gradients
    private.set_sync_gradients(accelerator, False)
    assert not accelerator.sync_gradients


def test_torch_loader() -> None:
    *_, loader = prepared()
    inner = private.torch_loader(loader)
    assert type(inner) is DataLoader
    assert private.torch_loader(inner) is inner


@pytest.mark.parametrize("is_split", [False, True])
def test_whole_sampler(is_split: bool) -> None:
    whole = BatchSampler(range(16), batch_size=4, drop_last=False)
    shard = BatchSamplerShard(whole, num_processes=2, process_index=1, split_batches=is_split)
    assert private.whole_sampler(shard) == (whole, 2 if is_split else 4)
    assert len(next(iter(shard))) == (2 if is_split else 4)
    assert private.whole_sampler(whole) == (whole, 4)


def test_batches_per_fetch() -> None:
    *_, loader = prepared()
    assert private.batches_per_fetch(loader) == 1
    dispatched = loop_runs.accelerator(dataloader_config=loop_runs.DataLoaderConfiguration(dispatch_batches=True))
    loader = dispatched.prepare(DataLoader(samples(), batch_size=4))
    loader.state.num_processes = 3
    assert private.batches_per_fetch(loader) == 3


def test_to_device_of() -> None:
    batch = {"x": torch.ones(2), "more": [torch.zeros(1)]}
    *_, loader = prepared()
    assert private.to_device_of(loader, batch)["x"].device == loader.device
    loader.device = torch.device("meta")
    moved = private.to_device_of(loader, batch)
    assert moved["x"].is_meta
    assert moved["more"][0].is_meta
    # One that stays where its batches are made, and one that is not prepared.
    loader.device = None
    assert private.to_device_of(loader, batch) is batch
    assert private.to_device_of(private.torch_loader(loader), batch) is batch


def test_shuffle_seed() -> None:
    *_, loader = prepared()
    assert private.shuffle_seed(loader) is None
    accelerator = loop_runs.seedable()
    first = accelerator.prepare(DataLoader(samples(), batch_size=4, shuffle=True))
    torch.manual_seed(77)
    second = accelerator.prepare(DataLoader(samples(), batch_size=4, shuffle=True))
    seed = private.shuffle_seed(first)
    assert seed is not None
    private.set_shuffle_seed(second, seed)
    for epoch in (0, 3):
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        assert [float(x.sum()) for x, _ in first] == [float(x.sum()) for x, _ in second]


def test_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = loop_runs.accelerator()
    for state in (PartialState(), AcceleratorState()):
        monkeypatch.setattr(state, "distributed_type", DistributedType.MULTI_CPU)
    private.set_processes(2, 5, local_rank=1)
    assert (accelerator.process_index, accelerator.num_processes, accelerator.local_process_index) == (2, 5, 1)
    assert accelerator.use_distributed
    assert not accelerator.is_main_process
    private.set_processes(0, 1)
    assert accelerator.is_main_process
    assert not accelerator.use_distributed
    assert torch.equal(accelerator.gather(torch.ones(3)), torch.ones(3)), "what needs a group is not asked for one"
    private.set_processes(0, 2)
    assert accelerator.distributed_type == PartialState().distributed_type == DistributedType.MULTI_CPU


def test_muted_loaders() -> None:
    accelerator, *_, loader = prepared(rng_types=["torch"])
    assert loader.rng_types == ["torch"]
    kinds = private.mute_loaders(accelerator)
    assert loader.rng_types is None
    assert accelerator.skip_first_batches(loader, 2).rng_types is None
    assert len(list(loader)) == 8
    private.unmute_loaders(accelerator, kinds)
    assert loader.rng_types == ["torch"]


def test_runs_collectives() -> None:
    *_, loader = prepared()
    assert not private.runs_collectives(loader)
    dispatched = loop_runs.accelerator(dataloader_config=loop_runs.DataLoaderConfiguration(dispatch_batches=True))
    assert private.runs_collectives(dispatched.prepare(DataLoader(samples(), batch_size=4)))


def test_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator, *_ = prepared()
    assert private.sharding(accelerator) is None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert private.sharding(accelerator) == "DEEPSPEED"
