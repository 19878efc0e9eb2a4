"""``scar.batches`` serves the samples that an undisturbed loop would have served, each once."""

import contextlib
import itertools
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loop_runs
import numpy as np
import pytest
import torch
import torch.distributed as dist
from ddp_runs import launched_by_torchrun
from helpers import BATCH_SIZE, Stream, samples
from lightning.fabric import Fabric
from loop_runs import Net, accelerator, seedable
from ranks import run_ranks
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_scar import SCARAccelerator, SCARLoop

#: Sets a loop up: the loop, the loader, and a function that steps.
Door = Callable[[Path, Any], tuple[SCARLoop, Any]]
OPTIONS: dict[str, Any] = {
    "every_n_steps": 1,
    "fraction": 1.0,
    "full_every_n_saves": 1,
    "save_on_exception": False,
}


def plain(dirpath: Path, loader: Any) -> tuple[SCARLoop, Any]:
    model = Net()
    return SCARLoop(
        dirpath, {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.01)}, **OPTIONS
    ), loader


def fabric(dirpath: Path, loader: Any) -> tuple[SCARLoop, Any]:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto")
    fabric.launch()
    model = Net()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.01))
    state = {"model": model, "optimizer": optimizer}
    return SCARLoop(dirpath, state, **OPTIONS), fabric.setup_dataloaders(loader)


def with_accelerate(dirpath: Path, loader: Any, make: Any = accelerator, **config: Any) -> tuple[SCARLoop, Any]:
    options = {"dataloader_config": loop_runs.DataLoaderConfiguration(**config)} if config else {}
    accelerator = make(**options)
    model = Net()
    model, _, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.01), loader)
    return SCARAccelerator(accelerator, dirpath, **OPTIONS), loader


def with_seed(dirpath: Path, loader: Any) -> tuple[SCARLoop, Any]:
    return with_accelerate(dirpath, loader, seedable)


def stateful(dirpath: Path, loader: Any) -> tuple[SCARLoop, Any]:
    return with_accelerate(dirpath, loader, use_stateful_dataloader=True)


def dispatched(dirpath: Path, loader: Any) -> tuple[SCARLoop, Any]:
    return with_accelerate(dirpath, loader, dispatch_batches=True)


def split(dirpath: Path, loader: Any) -> tuple[SCARLoop, Any]:
    return with_accelerate(dirpath, loader, split_batches=True)


def shuffled(**options: Any) -> Any:
    return DataLoader(samples(), batch_size=BATCH_SIZE, shuffle=True, **options)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": shuffled,
    "a generator": lambda: shuffled(generator=torch.Generator().manual_seed(3)),
    "two workers": lambda: shuffled(num_workers=2),
    "distributed": lambda: DataLoader(samples(), BATCH_SIZE, sampler=DistributedSampler(samples(), 1, 0)),
    "a batch sampler": lambda: DataLoader(samples(), batch_sampler=BatchSampler(RandomSampler(samples()), 4, True)),
    "stateful": lambda: StatefulDataLoader(samples(), batch_size=BATCH_SIZE, shuffle=True),
    "a stream with a state": lambda: StatefulDataLoader(Stream(), batch_size=BATCH_SIZE),
    "a stream without one": lambda: DataLoader(Stream(), batch_size=BATCH_SIZE),
}
DOORS: list[Door] = [plain, fabric, with_accelerate, with_seed, stateful, dispatched, split]


class Crash(Exception):
    """The end of a loop that is cut short."""


def seen_in(
    door: Door, make: Any, dirpath: Path, seed: int, after: int | None = None, draws: bool = False
) -> list[Any]:
    """What is seen in two epochs, or before a crash; perhaps the batch that crashes has drawn random numbers."""
    torch.manual_seed(seed)
    scar, loader = door(dirpath, make())
    # The model's first values had another seed.
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    seen: list[Any] = []
    with warnings.catch_warnings(), contextlib.suppress(Crash), scar:
        warnings.filterwarnings("error", message=".*repeated")
        scar.resume()
        for epoch in range(scar.epoch, 2):
            for x, _ in scar.batches(loader):
                if scar.batches_done == after:
                    torch.rand(int(draws))
                    raise Crash
                # What a model draws goes on as well.
                seen.append((epoch, float(x.sum()), float(torch.rand(()))))
                for optimizer in scar.state.parts.optimizers:
                    optimizer.step()
                scar.step()
    return seen


#: The other cells are left to `make test-all`.
CHOSEN = [
    *((door, name, 5) for door in (plain, with_accelerate) for name in LOADERS),
    *((door, "shuffled", after) for door in DOORS for after in (8, 11)),
]
ALL = list(itertools.product(DOORS, LOADERS, (5, 8, 11)))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("door", "name", "after"),
    [pytest.param(*cell, marks=[] if cell in CHOSEN else [pytest.mark.slow]) for cell in ALL],
)
def test_a_loop_continues_where_the_data_were(door: Door, name: str, after: int, tmp_path: Path) -> None:
    make = LOADERS[name]
    whole = seen_in(door, make, tmp_path / "whole", seed=1)
    first = seen_in(door, make, tmp_path / "cut", seed=1, after=after)
    assert first + seen_in(door, make, tmp_path / "cut", seed=2) == whole


@pytest.mark.parametrize("after", [5, 8, 11])
@pytest.mark.parametrize("door", [plain, with_accelerate])
def test_a_list_of_batches_continues(door: Door, after: int, tmp_path: Path) -> None:
    def make() -> Any:
        return list(DataLoader(samples(), batch_size=BATCH_SIZE))

    whole = seen_in(door, make, tmp_path / "whole", seed=1)
    first = seen_in(door, make, tmp_path / "cut", seed=1, after=after)
    assert first + seen_in(door, make, tmp_path / "cut", seed=2) == whole


@pytest.mark.parametrize("make", [shuffled, pytest.param(lambda: augmented(), marks=pytest.mark.slow)])
@pytest.mark.parametrize("door", [plain, with_accelerate, pytest.param(with_seed, marks=pytest.mark.slow)])
def test_an_error_within_a_batch_repeats_its_random_numbers(
    door: Door, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the batch has drawn is drawn again, when it is repeated; also right behind a resume."""
    whole = seen_in(door, make, tmp_path / "whole", seed=1)
    monkeypatch.setitem(OPTIONS, "every_n_steps", 1000)
    monkeypatch.setitem(OPTIONS, "save_on_exception", True)
    seen = []
    for seed, after in ((1, 5), (2, 5), (3, 11), (4, None)):
        seen += seen_in(door, make, tmp_path / "cut", seed=seed, after=after, draws=True)
    assert seen == whole


class Augmented(Dataset[Any]):
    """Adds noise of every kind."""

    def __len__(self) -> int:
        return 8 * BATCH_SIZE

    def __getitem__(self, index: int) -> Any:
        return torch.full((8,), float(index)) + torch.rand(8) + random.random() + float(np.random.rand()), index


def augmented() -> Any:
    return DataLoader(Augmented(), batch_size=BATCH_SIZE, shuffle=True)


@pytest.mark.parametrize("after", [5, *(pytest.param(after, marks=pytest.mark.slow) for after in (7, 8, 11))])
@pytest.mark.parametrize("door", [plain, with_accelerate, stateful, dispatched])
def test_random_numbers_of_a_dataset_go_on(door: Door, after: int, tmp_path: Path) -> None:
    """Also those of the batch that Accelerate has fetched ahead, before the save."""
    whole = seen_in(door, augmented, tmp_path / "whole", seed=1)
    seen = seen_in(door, augmented, tmp_path / "cut", seed=1, after=after)
    assert seen + seen_in(door, augmented, tmp_path / "cut", seed=2) == whole


def distributed() -> Any:
    return DataLoader(samples(16), BATCH_SIZE, sampler=DistributedSampler(samples(16)))


#: What two ranks iterate over: a plain loop over what each was given, Fabric over what it has divided among them.
OF_TWO: dict[str, tuple[Door, Callable[[], Any]]] = {
    "plain, distributed": (plain, distributed),
    "plain, each its own": (plain, shuffled),
    "plain, a stream": (plain, LOADERS["a stream with a state"]),
    "Fabric, shuffled": (fabric, lambda: DataLoader(samples(16), BATCH_SIZE, shuffle=True)),
    "Fabric, distributed": (fabric, distributed),
    "Fabric, stateful": (fabric, lambda: StatefulDataLoader(samples(16), batch_size=BATCH_SIZE, shuffle=True)),
}


def see_as_rank(rank: int, names: list[str], folder: Path, after: int) -> list[Any]:
    launched_by_torchrun(rank)
    seen = []
    for name in names:
        door, make = OF_TWO[name]
        whole = seen_in(door, make, folder / name / "whole", seed=rank)
        first = seen_in(door, make, folder / name / "cut", seed=rank, after=after)
        seen.append((whole, first + seen_in(door, make, folder / name / "cut", seed=5 + rank)))
    return seen


@pytest.mark.parametrize("after", [11, *(pytest.param(after, marks=pytest.mark.slow) for after in (5, 8))])
def test_loops_on_two_ranks_continue_where_their_data_were(after: int, tmp_path: Path) -> None:
    of_rank = run_ranks(see_as_rank, 2, list(OF_TWO), tmp_path, after)
    for name, *of_name in zip(OF_TWO, *of_rank, strict=True):
        for whole, resumed in of_name:
            assert len(whole) == 16, name
            assert resumed == whole, name
        # Each rank sees and draws what is its own.
        assert of_name[0] != of_name[1]
