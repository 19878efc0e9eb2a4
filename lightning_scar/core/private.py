"""The private API of torch that this library uses, and the texts of its that it reads.

Each is wrapped in one function, with a test that fails when torch changes.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.utils.data import DataLoader

_KEYS = re.compile(r"^(Missing|Unexpected) key\(s\) in state_dict: (.*)\.\s*$")
_SIZES = re.compile(r"^size mismatch for (.+): copying a param with shape (.+) from checkpoint, .* model is (.+)\.$")


def default_store() -> Store:
    """Return the store of the default process group; every group has its own."""
    return dist.distributed_c10d._get_default_store()


@contextmanager
def without_group() -> Iterator[None]:
    """Let this program see no default process group, though there is one: ``dist.is_initialized()`` is ``False``."""
    members = dist.distributed_c10d.GroupMember
    group, members.WORLD = members.WORLD, None
    try:
        yield
    finally:
        members.WORLD = group


def has_compiled() -> bool:
    """Return whether ``torch.compile`` has compiled anything in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and dynamo.counters["stats"]["unique_graphs"] > 0


def complaints(error: RuntimeError) -> list[str]:
    """Return what ``Module.load_state_dict`` complains of, one line for each tensor.

    Args:
        error: Its error, or several in one text.

    Returns:
        Lines as of :func:`~lightning_scar.core.compatibility.differences`; none if the error is of something else.

    """
    header, *lines = str(error).split("\n\t")
    return [found for line in lines for found in _said(line)] if "loading state_dict for" in header else []


def _said(line: str) -> list[str]:
    if keys := _KEYS.match(line):
        kind = {"Missing": "missing", "Unexpected": "extra"}[keys[1]]
        return [f"{kind}: {name}" for name in re.findall(r'"([^"]*)"', keys[2])]
    if sizes := _SIZES.match(line):
        name, saved, live = sizes.groups()
        return [f"reshaped: {name} is {_shape(saved)} in the checkpoint, {_shape(live)} in the model"]
    return [f"refused: {line}"]


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def forget_iterator(loader: "DataLoader[Any]") -> None:
    """Let a loader make its next iterator anew: one that it has kept, such as for its workers, keeps its sampler."""
    if hasattr(loader, "load_state_dict"):
        loader.load_state_dict({})
    elif getattr(loader, "_iterator", None) is not None:
        loader._iterator = None
