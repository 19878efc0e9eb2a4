"""In each front door, a rank loads the batches that another one is given at the same time."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DataLoaderConfiguration
from ddp_runs import launched_by_torchrun
from helpers import BATCH_SIZE, Stream, TinyModel, make_trainer, samples
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from loop_runs import Net, accelerator
from ranks import run_ranks
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, DistributedSampler, Subset, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_scar import SCARAccelerator, SCARLoop
from lightning_scar.continuation.rank_orders import RankOrders
from lightning_scar.core.data_order import Beginning
from lightning_scar.core.random_generators import random_generators, same_state
from lightning_scar.elastic.worker import state_folder
from lightning_scar.lightning.data import TrainingData
from lightning_scar.loops.framework import Framework

SIZE = 3
EPOCHS = 2
#: What a rank has: the batches that it was given, those that it derived of each rank, and why it could not.
Seen = dict[str, Any]

#: Not a multiple of the ranks, nor of the batch size.
DATA = Subset(samples(16), range(61))


def shuffled(**options: Any) -> Any:
    return DataLoader(DATA, batch_size=BATCH_SIZE, shuffle=True, **options)


def distributed(kind: Any = DataLoader, **options: Any) -> Any:
    return kind(DATA, batch_size=BATCH_SIZE, sampler=DistributedSampler(DATA), **options)


def weighted() -> Any:
    sampler = WeightedRandomSampler(range(1, 62), 61, generator=torch.Generator().manual_seed(3))
    return DataLoader(DATA, batch_size=BATCH_SIZE, sampler=sampler)


def by_global() -> Any:
    """As Lightning's and Fabric's wrappers divide it: a rank's order depends on a global generator."""
    return DataLoader(DATA, batch_size=BATCH_SIZE, sampler=WeightedRandomSampler(range(1, 62), 61))


def of_its_own() -> Any:
    sampler = WeightedRandomSampler(
        [1.0] * 61, 61, generator=torch.Generator().manual_seed(torch.distributed.get_rank())
    )
    return DataLoader(DATA, batch_size=BATCH_SIZE, sampler=sampler)


def short() -> Any:
    return DataLoader(samples(6), batch_size=BATCH_SIZE, shuffle=True)


def stream() -> Any:
    return DataLoader(Stream(), batch_size=BATCH_SIZE)


def plain(folder: Path, make: Callable[[], Any]) -> tuple[SCARLoop, Any]:
    model = Net()
    return SCARLoop(folder, {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.01)}), make()


def with_fabric(folder: Path, make: Callable[[], Any]) -> tuple[SCARLoop, Any]:
    fabric = Fabric(accelerator="cpu", devices=SIZE, strategy="ddp")
    fabric.launch()
    model = Net()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.01))
    return SCARLoop(folder, {"model": model, "optimizer": optimizer}), fabric.setup_dataloaders(make())


def with_accelerate(folder: Path, make: Callable[[], Any], **config: Any) -> tuple[SCARLoop, Any]:
    accelerate = accelerator(dataloader_config=DataLoaderConfiguration(**config))
    model = Net()
    model, _, loader = accelerate.prepare(model, torch.optim.SGD(model.parameters(), 0.01), make())
    return SCARAccelerator(accelerate, folder), loader


def seedable(folder: Path, make: Callable[[], Any]) -> tuple[SCARLoop, Any]:
    return with_accelerate(folder, make, use_seedable_sampler=True)


def split(folder: Path, make: Callable[[], Any]) -> tuple[SCARLoop, Any]:
    return with_accelerate(folder, lambda: DataLoader(DATA, SIZE * BATCH_SIZE, shuffle=True), split_batches=True)


def uneven(folder: Path, make: Callable[[], Any]) -> tuple[SCARLoop, Any]:
    return with_accelerate(folder, make, even_batches=False)


def stateful(folder: Path, make: Callable[[], Any]) -> tuple[SCARLoop, Any]:
    return with_accelerate(folder, make, use_stateful_dataloader=True, use_seedable_sampler=True)


LOOPS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "plain": (plain, distributed),
    "plain, workers": (
        plain,
        lambda: distributed(num_workers=2, persistent_workers=True, multiprocessing_context="fork"),
    ),
    "plain, stateful": (plain, lambda: distributed(StatefulDataLoader)),
    "plain, each its own": (plain, shuffled),
    "plain, a stream": (plain, stream),
    "Fabric": (with_fabric, shuffled),
    "Fabric, weighted": (with_fabric, weighted),
    "Fabric, global": (with_fabric, by_global),
    "Accelerate": (with_accelerate, shuffled),
    "Accelerate, workers": (with_accelerate, lambda: shuffled(num_workers=1, multiprocessing_context="fork")),
    "Accelerate, seedable": (seedable, shuffled),
    "Accelerate, split": (split, shuffled),
    "Accelerate, uneven": (uneven, shuffled),
    "Accelerate, stateful": (stateful, shuffled),
}
TRAINERS: dict[str, Callable[[], Any]] = {
    "Trainer, shuffled": shuffled,
    "Trainer, distributed": lambda: distributed(num_workers=1, multiprocessing_context="fork"),
    "Trainer, weighted": weighted,
    "Trainer, global": by_global,
    "Trainer, each its own": of_its_own,
    "Trainer, stateful": lambda: distributed(StatefulDataLoader),
    "Trainer, a stream": stream,
    "Trainer, one of a dict": lambda: {"a": shuffled()},
    "Trainer, two": lambda: [shuffled(), distributed()],
    "Trainer, until the shorter one ends": lambda: CombinedLoader([shuffled(), short()], "min_size"),
    "Trainer, until the longer one ends": lambda: CombinedLoader([shuffled(), short()], "max_size"),
    "Trainer, a shorter one again": lambda: [shuffled(), short()],
}


#: Where nothing is known: the reason.
UNKNOWN = {
    "plain, each its own": "BatchSampler of RandomSampler does not know its rank",
    "plain, a stream": "Stream has no indices",
    "Trainer, a stream": "Stream has no indices",
    "Trainer, each its own": "BatchSampler of DistributedSamplerWrapper draws from a random generator, and another",
    "Trainer, a shorter one again": "shorter loaders begin anew within an epoch",
}
#: Of all doors, those that the others are alike.
CHOSEN = ["Accelerate", "Trainer, each its own"]


def look(data: Any, epoch: int, seen: Seen, batch: Any) -> None:
    """Notes a batch, and at some of them those of all ranks, that of the batch before as well."""
    position = data.position
    seen["own"][epoch, position] = batch
    if position > 1 and position % 3:
        return
    before = random_generators()
    # The others have begun the epoch, too, and wait.
    torch.distributed.barrier()
    places = range(max(position - 1, 0), position + 1)
    reason = data.why_batches_unknown(SIZE - 1, places.start)
    seen["why"].add(reason)
    if reason is None:
        for rank in range(SIZE):
            found = zip(places, data.batches_of(rank, places), strict=True)
            seen["derived"] += [(rank, (epoch, at), batch) for at, batch in found]
    if position % 2:
        data.release_batches()
    torch.distributed.barrier()
    assert same_state(before, random_generators())


def see_loop(seen: Seen, folder: Path, door: Any, make: Callable[[], Any]) -> None:
    scar, loader = door(folder, make)
    with scar:
        scar.resume()
        for epoch in range(EPOCHS):
            for batch in scar.batches(loader):
                look(scar.state.data, epoch, seen, batch)
                for optimizer in scar.state.parts.optimizers:
                    optimizer.step()
                scar.step()


class Look(Callback):
    """Looks in each batch."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        assert TrainingData.of(trainer).position == batch_idx
        look(TrainingData.of(trainer), trainer.current_epoch, self.seen, batch)


class FirstOfTwo(TinyModel):
    """Learns from a batch, or the first of two, or one of a name."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch = batch["a"] if isinstance(batch, dict) else batch
        return self.loss(batch[0] if isinstance(batch[0], list) else batch)


def see_trainer(seen: Seen, launched: dict[str, Any], make: Callable[[], Any]) -> None:
    trainer = make_trainer(Look(seen), max_epochs=EPOCHS, **launched)
    TrainingData.of(trainer)
    trainer.fit(FirstOfTwo(), make())


def see(rank: int, names: list[str], folder: Path) -> dict[str, Seen]:
    launched, found = launched_by_torchrun(rank), {}
    warnings.simplefilter("ignore")
    (folder / "state").mkdir(exist_ok=True)
    for name in names:
        torch.manual_seed(5)
        os.environ[state_folder.VARIABLE] = str(folder / "state" / name)
        Path(os.environ[state_folder.VARIABLE]).mkdir(exist_ok=True)
        seen = found[name] = {"own": {}, "why": set(), "derived": []}
        if name in LOOPS:
            see_loop(seen, folder / name, *LOOPS[name])
        else:
            see_trainer(seen, launched, TRAINERS[name])
    return found


@pytest.mark.parametrize("names", [CHOSEN, pytest.param([*LOOPS, *TRAINERS], marks=pytest.mark.slow)])
def test_each_front_door_gives_what_the_other_ranks_are_given(names: list[str], tmp_path: Path) -> None:
    of_rank = run_ranks(see, SIZE, names, tmp_path, limit=150)
    for name in names:
        for seen in (found[name] for found in of_rank):
            (why,) = seen["why"]
            assert (why or "").startswith(UNKNOWN.get(name, "")), name
            assert (why is None) == (name not in UNKNOWN) == bool(seen["derived"]), name
            for rank, place, batch in seen["derived"]:
                expected = of_rank[rank][name]["own"].get(place)
                assert (batch is None) == (expected is None), name
                leaves, spec = tree_flatten(batch)
                assert spec == tree_flatten(expected)[1], name
                pairs = zip(leaves, tree_flatten(expected)[0], strict=True)
                assert all(a is b is None or torch.equal(a, b) for a, b in pairs), f"{name}, {rank} at {place}"


def test_fabric_moves_the_batches_of_others_to_its_device(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(shuffled())
    loader._device = torch.device("meta")
    framework = Framework({})
    x, y = framework.given(loader, DATA[0])
    assert x.is_meta
    assert y.is_meta
    assert loader._num_iter_calls == 0
    assert framework.given(shuffled(), x) is x


def test_ranks_of_a_host_know_whether_they_divide_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_epoch(number: int) -> Beginning:
        return Beginning(None, states={"torch": torch.arange(number), 0: [number, (2, None)]})

    first, second, third = map(RankOrders, range(3))
    first.note(of_epoch(1))
    assert first.agrees(1) is None  # Nobody asks without a supervisor.
    monkeypatch.setenv(state_folder.VARIABLE, str(tmp_path))
    second.note(of_epoch(1))
    assert second.agrees(0) is None
    first.note(of_epoch(1))
    assert second.agrees(0)
    # The other one may have died before the epoch began.
    first.note(of_epoch(2))
    assert first.agrees(1)
    first.note(of_epoch(3))
    assert first.agrees(1) is False
    assert second.agrees(0) is False
    assert third.agrees(0) is False
