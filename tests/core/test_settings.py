import re
from typing import Any

import pytest
import torch

from lightning_scar.core import selection
from lightning_scar.core.settings import Settings


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("fraction", 0, "must be in (0, 1]"),
        ("fraction", True, "must be in (0, 1]"),
        ("fraction", "1", "must be in (0, 1]"),
        ("fraction", -0.5, "must be in (0, 1]"),
        ("fraction", 1.01, "must be in (0, 1]"),
        ("fraction", float("nan"), "must be in (0, 1]"),
        ("fraction", float("inf"), "must be in (0, 1]"),
        ("policy", "nearest", "must be one of distance, round_robin, random"),
        ("policy", 3, "must be one of distance, round_robin, random"),
        ("block_size", 0, "at least 1"),
        ("block_size", 4096.0, "a whole number"),
        ("block_size", True, "None or a whole number"),
        ("max_age", -1, "at least 0"),
        ("staging", "later", "must be 'lazy' or 'eager'"),
        ("on_write_error", "ignore", "must be 'warn' or 'raise'"),
        ("refresh", "always", "must be 'auto' or None"),
        ("refresh", True, "must be 'auto' or None"),
        ("memory", "false", "must be True or False"),
        ("memory", "/dev/shm/x", "LIGHTNING_SCAR_MEMORY sets the folder"),
        ("memory", None, "must be True or False"),
        ("durable_every_n_saves", None, "must be a whole number of at least 1"),
        ("durable_every_n_saves", True, "must be a whole number of at least 1"),
        ("replicas", None, "must be a whole number of at least 0"),
        ("replicas", True, "must be a whole number of at least 0"),
        ("memory_limit", True, "None or a whole number of at least 1"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_remedy(name: str, value: Any, remedy: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")) as caught:
        Settings(**{name: value})
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    "allowed",
    [{"fraction": 1}, {"fraction": 1e-6}, {"block_size": 1}, {"max_age": 0}, {"staging": "eager"}, {"refresh": None}],
    ids=str,
)
def test_the_ends_of_the_ranges_are_allowed(allowed: dict[str, Any]) -> None:
    Settings(**allowed)


@pytest.mark.parametrize("name", ["distance", "round_robin", "random"])
def test_a_policy_is_found_by_its_name(name: str) -> None:
    assert Settings(policy=name).policy_function is getattr(selection, name)


def test_a_function_is_a_policy() -> None:
    def newest(candidates: selection.Candidates) -> torch.Tensor:
        return -candidates.age

    assert Settings(policy=newest).policy_function is newest
