"""What the next start could not load is noticed when it is first saved."""

import enum
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_scar.core.running_checkpoint import RunningCheckpoint


class Mode(enum.Enum):
    FAST = 1


def warned(dirpath: Any, weights_only: bool | None, saves: int = 3, **more: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with RunningCheckpoint(dirpath) as running:
            running.read_back.expect(weights_only)
            for step in range(saves):
                running.save_now({"state_dict": {"weight": torch.full((4,), float(step))}, **more}, step)
    return [str(warning.message) for warning in caught if "weights_only" in str(warning.message)]


@pytest.mark.parametrize("saves", [1, 3])
@pytest.mark.parametrize("weights_only", [None, True])
def test_what_will_be_refused_is_told_once_with_its_place(
    saves: int, weights_only: bool | None, memory_url: str
) -> None:
    parts = {"hyper_parameters": {"lr": 0.1, "data": {"root": Path("a"), "mode": Mode.FAST}}, "epoch": 3}
    (text,) = warned(memory_url, weights_only, saves, **parts)
    assert text.startswith(f"lightning-scar: the next start cannot resume from {memory_url}")
    assert re.search(
        r"refuses hyper_parameters/data/root \(pathlib\.\w+\), hyper_parameters/data/mode \(\S+Mode\)\. ", text
    )
    assert "`weights_only=False`" in text


def test_nothing_is_told_of_what_can_be_loaded(memory_url: str) -> None:
    refused = {"hyper_parameters": {"root": Path("a")}}
    assert warned(f"{memory_url}/a", weights_only=False, **refused) == []
    assert warned(f"{memory_url}/b", weights_only=None, hyper_parameters=OrderedDict(lr=0.1), epoch=3) == []
    with torch.serialization.safe_globals([type(Path())]):
        assert warned(f"{memory_url}/c", weights_only=None, **refused) == []
