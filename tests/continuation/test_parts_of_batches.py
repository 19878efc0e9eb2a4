"""Whose batches survivors compute: together always what all workers would have computed."""

from collections import Counter, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from lightning_scar.continuation.parts import NotSliceableError, deal, part_of

Pair = namedtuple("Pair", "x y")


@st.composite
def outages(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """A number of workers, and who is present in each step: workers die and join, but never all are missing."""
    size = draw(st.integers(1, 6))
    slots = st.lists(st.integers(0, size - 1), min_size=1, unique=True).map(sorted)
    return size, draw(st.lists(slots, min_size=1, max_size=5))


@given(
    outages(),
    st.booleans(),
    st.integers(1, 60),
    st.integers(1, 7),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_each_step_has_the_samples_of_an_undisturbed_run(
    outage: tuple[int, list[list[int]]],
    is_sliced: bool,
    length: int,
    batch_size: int,
    drop_last_batch: bool,
    drop_last_samples: bool,
    shuffle: bool,
) -> None:
    size, steps = outage
    loaders = [
        DataLoader(
            range(length),  # type: ignore[arg-type]
            batch_size=batch_size,
            sampler=DistributedSampler(
                range(length),  # type: ignore[arg-type]
                num_replicas=size,
                rank=rank,
                shuffle=shuffle,
                drop_last=drop_last_samples and length >= size,
            ),
            drop_last=drop_last_batch,
        )
        for rank in range(size)
    ]
    for members, *batches in zip(steps, *loaders, strict=False):
        weights: Counter[int] = Counter()
        samples: Counter[int] = Counter()
        for member, parts in deal(members, size, is_sliced).items():
            samples.update(batches[member].tolist())
            weights[member] += 1
            for part in parts:
                piece, share = part_of(batches[part.slot], part.number, part.of)
                samples.update(piece.tolist())
                weights[part.slot] += share
        assert samples == Counter(torch.cat(batches).tolist())
        assert [weights[slot] for slot in range(size)] == pytest.approx([1] * size)


@given(st.integers(1, 8), st.data())
def test_work_is_dealt_out_evenly(size: int, data: st.DataObject) -> None:
    members = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    whole = deal(members, size, is_sliced=False)
    assert max(map(len, whole.values())) - min(map(len, whole.values())) <= 1
    if 0 not in members:
        assert 0 in [part.slot for part in whole[members[0]]]
    for parts in deal(members, size, is_sliced=True).values():
        assert [part.slot for part in parts] == [slot for slot in range(size) if slot not in members]


def test_a_batch_of_any_common_form_is_sliced() -> None:
    x = torch.arange(8).view(4, 2)
    batch: Any = {"x": x, "pair": Pair(x[:, 0], (x[:, 1],)), "names": list("abcd"), "lr": 0.1, "one": torch.tensor(1.0)}
    piece, share = part_of(batch, 0, 3)
    assert share == 1 / 4
    assert piece["x"].tolist() == [[0, 1]]
    assert isinstance(piece["pair"], Pair)
    assert (piece["pair"].x.tolist(), piece["pair"].y[0].tolist()) == ([0], [1])
    assert (piece["names"], piece["lr"], piece["one"]) == (["a"], 0.1, batch["one"])
    assert part_of(batch, 0, 1) == (batch, 1.0)
    assert [part_of(x[:1], number, 2)[1] for number in range(2)] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        ([torch.zeros(4, 2), torch.zeros(3)], r"a tensor of shape \(3,\) is in a batch of 4 samples"),
        ([torch.zeros(4), object()], "the batch contains a object"),
        (3, "no tensor"),
    ],
)
def test_others_are_not(batch: Any, what: str) -> None:
    with pytest.raises(NotSliceableError, match=what):
        part_of(batch, 0, 2)
