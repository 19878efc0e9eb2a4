"""A resumed run serves the samples that an undisturbed one would have served, each once."""

import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BATCH_SIZE, BATCHES, Stream, TinyModel, cut_short, fit, loader, samples, saver
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
    return CombinedLoader(
        {"a": loader(shuffle=True, generator=generator()), "b": loader(3, shuffle=True, generator=generator())}, mode
    )


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


@pytest.mark.sampled(3)
@pytest.mark.parametrize("after", [5, 8, 11])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in LOADERS])
def test_any_loader_of_a_dataset_with_indices_continues(name: str, after: int, memory_url: str) -> None:
    whole = seen_by(LOADERS[name], f"{memory_url}/whole", None)
    assert seen_by(LOADERS[name], f"{memory_url}/cut", after) == whole


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 6},
        {"accumulate_grad_batches": 2},
        {"val_check_interval": 3, "limit_val_batches": 1},
        {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_whatever_the_trainer_does_with_them(options: dict[str, Any], memory_url: str) -> None:
    class WithData(TinyModel):
        def train_dataloader(self) -> Any:
            return loader(shuffle=True, generator=generator())

        def val_dataloader(self) -> Any:
            return loader()

    whole = seen_by(lambda: None, f"{memory_url}/whole", None, WithData, **options)
    assert seen_by(lambda: None, f"{memory_url}/cut", 4, WithData, **options) == whole


@pytest.mark.sampled(3)
@pytest.mark.parametrize("after", [2, 5, 6, 10])
@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size", "min_size"])
def test_several_loaders_continue_each_at_its_own_place(mode: str, after: int, memory_url: str) -> None:
    """With the first mode, the one of three batches begins anew in the middle of the epoch."""
    if mode == "min_size" and after > 5:
        pytest.skip("an epoch has three batches")

    class Either(Paired):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return super().training_step({**batch, "b": batch["b"] or [torch.zeros(1)]}, batch_idx)

    make = partial(pair, mode)
    whole = seen_by(make, f"{memory_url}/whole", None, Either, max_epochs=2)
    assert seen_by(make, f"{memory_url}/cut", after, Either, max_epochs=2) == whole


class StreamLoader:
    """A loader of its own kind, which is asked for one batch ahead."""

    def __init__(self) -> None:
        self.data = Stream()

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(self.data, batch_size=BATCH_SIZE))

    def state_dict(self) -> dict[str, Any]:
        return self.data.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.data.load_state_dict(state)


STREAMS: dict[str, Callable[[], Any]] = {
    "torchdata's": lambda: StatefulDataLoader(Stream(), batch_size=BATCH_SIZE),
    "torchdata's with workers": lambda: StatefulDataLoader(Stream(), batch_size=BATCH_SIZE, num_workers=1),
    "another": StreamLoader,
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("after", [5, 8, 11])
@pytest.mark.parametrize("name", STREAMS)
def test_data_without_a_length_lose_no_batch(name: str, after: int, memory_url: str) -> None:
    whole = seen_by(STREAMS[name], f"{memory_url}/whole", None)
    assert seen_by(STREAMS[name], f"{memory_url}/cut", after) == whole


@pytest.mark.parametrize("make", [loader, *STREAMS.values(), LOADERS["stateful"]])
def test_a_batch_that_failed_is_served_again(make: Callable[[], Any], memory_url: str) -> None:
    class Fails(TinyModel):
        fails = True

        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            output = super().training_step(batch, batch_idx)
            if self.fails and batch_idx == 4:
                self.seen.pop()
                raise RuntimeError("out of memory")
            return output

    seed_everything(1, verbose=False)
    whole = fit(saver(f"{memory_url}/whole"), model=TinyModel(), data=make()).seen
    seed_everything(1, verbose=False)
    first, second = Fails(), TinyModel()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(saver(f"{memory_url}/cut", save_on_exception=True), model=first, data=make())
    fit(saver(f"{memory_url}/cut"), model=second, data=make())
    assert (first.seen + second.seen)[:8] == whole[:8]


def test_what_cannot_be_placed_is_said_once(memory_url: str) -> None:
    class Nameless:
        def __iter__(self) -> Iterator[Any]:
            return iter(loader())

    cut_short(saver(memory_url), after=5, data=Nameless())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(saver(memory_url), data=Nameless())
    texts = [str(each.message) for each in caught if "repeated" in str(each.message)]
    assert len(texts) == 1
    assert "Nameless has neither indices nor a state" in texts[0]


def test_a_sampler_that_draws_globally_all_the_time_is_said(memory_url: str) -> None:
    class Draws(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return (int(torch.randint(SAMPLES, ())) for _ in range(SAMPLES))

        def __len__(self) -> int:
            return SAMPLES

    cut_short(saver(memory_url), after=5, data=loader(sampler=Draws()))
    with pytest.warns(UserWarning, match="draws from a global random generator throughout"):
        fit(saver(memory_url), data=loader(sampler=Draws()))


def test_what_is_skipped_is_not_loaded(memory_url: str) -> None:
    asked: list[int] = []

    class Watched(torch.utils.data.Dataset[Any]):
        def __getitem__(self, i: int) -> Any:
            asked.append(i)
            return samples()[i]

        def __len__(self) -> int:
            return SAMPLES

    data = lambda: DataLoader(Watched(), batch_size=BATCH_SIZE, shuffle=True, generator=generator())  # noqa: E731
    cut_short(saver(memory_url), after=6, data=data(), max_epochs=1)
    done = set(asked[: 6 * BATCH_SIZE])
    asked.clear()
    fit(saver(memory_url), data=data(), max_epochs=1)
    assert len(asked) == 2 * BATCH_SIZE
    assert not set(asked) & done


def test_a_loader_is_given_back_as_it_was(memory_url: str) -> None:
    data = loader(shuffle=True)
    own = data.batch_sampler
    fit(saver(memory_url), data=data)
    assert data.batch_sampler is own
    with pytest.raises(RuntimeError, match="no"):
        fit(saver(f"{memory_url}/2"), data=data, model=_Fails())
    assert data.batch_sampler is own


class _Fails(TinyModel):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        raise RuntimeError("no")
