"""A training step may do with its batch what it likes: computed again, it gets the same one."""

import copy
from collections import UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_scar.continuation.kept_batch import KeptBatch

Pair = namedtuple("Pair", "x y")


class Graph:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a key is taken out": (lambda: {"x": torch.ones(2), "y": torch.zeros(2)}, lambda batch: batch.pop("y")),
    "one of a dict of a library": (lambda: UserDict(x=torch.ones(2)), lambda batch: batch.pop("x")),
    "a tensor is scaled": (lambda: [torch.ones(2), "name"], lambda batch: batch[0].mul_(3)),
    "an item is replaced": (lambda: [torch.ones(2), 1], lambda batch: batch.__setitem__(0, batch[0] * 3)),
    "inside": (lambda: Pair({"a": [torch.ones(2)]}, None), lambda batch: batch.x["a"].append(batch.x["a"][0].add_(1))),
    "an attribute": (lambda: Graph(torch.ones(2)), lambda batch: setattr(batch, "x", batch.x.sub_(1) + 2)),
}


def content(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Graph | UserDict):
        return content(vars(value))
    if isinstance(value, dict):
        return {key: content(each) for key, each in value.items()}
    return [content(each) for each in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("kind", CHANGES)
def test_a_batch_is_given_back(kind: str) -> None:
    make, change = CHANGES[kind]
    kept = KeptBatch()
    for _ in range(3):
        batch = make()
        before = copy.deepcopy(batch)
        kept.save(batch)
        for _ in range(2):
            change(batch)
            assert content(batch) != content(before)
            kept.restore()
            assert content(batch) == content(before)
        change(batch)


def test_tensors_are_copied_only_if_they_were_changed() -> None:
    kept = KeptBatch()
    kept.save(torch.ones(2))
    batch = torch.ones(2)
    kept.save(batch)
    batch.mul_(2)
    with pytest.warns(UserWarning, match="changes its batch in place, but did not before"):
        kept.restore()
    kept.save(torch.ones(2))
    batch = torch.ones(2)
    kept.save(batch)
    batch.mul_(2)
    kept.save(batch)
    batch.mul_(2)
    kept.restore()
    assert batch.tolist() == [2, 2]


def test_nothing_is_kept_of_no_batch() -> None:
    kept = KeptBatch()
    kept.save(None)
    kept.restore()
