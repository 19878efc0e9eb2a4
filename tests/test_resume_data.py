"""A resumed run serves the samples that an undisturbed one would have served, each once."""

import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BATCH_SIZE, BATCHES, TinyModel, cut_short, fit, loader, samples, saver
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

SAMPLES = BATCHES * BATCH_SIZE


class FromNumPy(Sampler[int]):
    """Permutes with a generator of its own, as many users' samplers do."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.rng = make(3)

    def __iter__(self) -> Iterator[int]:
        order = list(range(SAMPLES))
        self.rng.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return SAMPLES


class GlobalPython(Sampler[int]):
    """Permutes with Python's global generator."""

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(SAMPLES), SAMPLES))

    def __len__(self) -> int:
        return SAMPLES


class Buckets(Sampler[list[int]]):
    """Makes batches of several sizes."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(4)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(SAMPLES, generator=self.generator).tolist()
        for i in range(BATCHES):
            yield order[4 * i : 4 * i + 3 + i % 2]

    def __len__(self) -> int:
        return BATCHES


class Paired(TinyModel):
    """Learns from the first of two loaders, and remembers both."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self.seen.append((-1, float(batch["b"][0].sum())))
        return super().training_step(batch["a"], batch_idx)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def pair(mode: Any) -> CombinedLoader:
    return CombinedLoader({"a": loader(shuffle=True), "b": loader(3, shuffle=True, generator=generator())}, mode)


#: Loaders by name; every call makes a new one, as a new process does.
LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": partial(loader, shuffle=True),
    "shuffled by a generator": lambda: loader(shuffle=True, generator=generator()),
    "in order": loader,
    "workers": lambda: loader(shuffle=True, num_workers=2),
    "workers that stay": lambda: loader(shuffle=True, num_workers=1, persistent_workers=True, generator=generator()),
    "distributed": lambda: loader(sampler=DistributedSampler(samples(), num_replicas=1, rank=0)),
    "weighted": lambda: loader(sampler=WeightedRandomSampler(torch.arange(1.0, SAMPLES + 1), SAMPLES)),
    "with replacement": lambda: loader(sampler=RandomSampler(samples(), replacement=True, generator=generator())),
    "a subset": lambda: loader(sampler=SubsetRandomSampler(range(SAMPLES))),
    "NumPy": lambda: loader(sampler=FromNumPy(np.random.default_rng)),
    "NumPy's old kind": lambda: loader(sampler=FromNumPy(np.random.RandomState)),
    "Python": lambda: loader(sampler=FromNumPy(random.Random)),
    "Python's global": lambda: loader(sampler=GlobalPython()),
    "batches of several sizes": lambda: DataLoader(samples(), batch_sampler=Buckets()),
    "a batch sampler": lambda: DataLoader(samples(), batch_sampler=BatchSampler(RandomSampler(samples()), 4, True)),
    "stateful": lambda: StatefulDataLoader(samples(), batch_size=BATCH_SIZE, shuffle=True),
}
SLOW = ["workers that stay", "NumPy's old kind", "Python", "a subset"]


def seen_by(make: Callable[[], Any], url: str, after: int | None, model: Any = TinyModel, **options: Any) -> list[Any]:
    """What is seen by one run, or by one that is cut short and another one that resumes it."""
    seed_everything(1, verbose=False)
    if after is None:
        return fit(saver(url), model=model(), data=make(), **options).seen
    first = cut_short(saver(url, full_every_n_saves=1), after=after, model=model(), data=make(), **options)
    seed_everything(2, verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(repeated|not resumable)")
        second = fit(saver(url), model=model(), data=make(), **options)
    return first.seen + second.seen


@pytest.mark.parametrize("after", [5, 8, 11])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in LOADERS])
def test_any_loader_of_a_dataset_with_indices_continues(name: str, after: int, memory_url: str) -> None:
    whole = seen_by(LOADERS[name], f"{memory_url}/whole", None)
    assert seen_by(LOADERS[name], f"{memory_url}/cut", after)[:16] == whole[:16]
