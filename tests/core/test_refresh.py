"""How the bytes of a save are divided between exact blocks and a refresh."""

from typing import Any

import pytest
import torch

from lightning_scar.core.blocks import Group, Slot
from lightning_scar.core.refresh import plan

ADAM = ("param", "exp_avg", "exp_avg_sq")


def group_of(*slots: str, rows: int = 256, width: int = 64, lazy: bool = True, dtype: Any = torch.float32) -> Group:
    return Group("w", (rows, width), tuple(Slot(name, dtype, None, ()) for name in slots), 4, lazy=lazy)


def signs(group: Group, **negative: bool) -> dict[tuple[str, str], bool]:
    return {(group.name, slot): is_negative for slot, is_negative in negative.items()}


def state_bytes(group: Group) -> int:
    return group.rows * group.row_nbytes


def test_a_save_of_everything_needs_no_refresh() -> None:
    group = group_of(*ADAM)
    assert plan([group], state_bytes(group), signs(group, exp_avg=True, exp_avg_sq=False), 1.0) == {}


def test_the_parameter_is_signed_and_so_are_moments_that_have_been_negative() -> None:
    group = group_of(*ADAM)
    found = plan([group], state_bytes(group), signs(group, exp_avg=True, exp_avg_sq=False), 0.25)["w"]
    assert {slot: codec.kind for slot, codec in found.items()} == {
        "param": "linear",
        "exp_avg": "linear",
        "exp_avg_sq": "log",
    }


def test_a_slot_whose_signs_are_not_known_yet_waits() -> None:
    group = group_of(*ADAM)
    assert plan([group], state_bytes(group), {}, 0.25)["w"].keys() == {"param"}


def test_buffers_are_not_refreshed() -> None:
    assert plan([group_of("param", lazy=False)], 10**6, {}, 0.25) == {}


def test_the_bits_follow_from_what_the_share_of_the_state_has_room_for() -> None:
    def names(slots: tuple[str, ...], fraction: float, **negative: bool) -> dict[str, str]:
        group = group_of(*slots)
        found = plan([group], state_bytes(group), signs(group, **negative), fraction).get("w", {})
        return {slot: codec.name for slot, codec in found.items()}

    moments = {"exp_avg": True, "exp_avg_sq": False}
    assert names(ADAM, 1 / 3, **moments) == {"param": "linear8", "exp_avg": "linear8", "exp_avg_sq": "log8"}
    assert names(ADAM, 1 / 6, **moments) == {"param": "linear4", "exp_avg": "linear4", "exp_avg_sq": "log4"}
    assert names(ADAM, 1 / 8, **moments) == {"param": "linear4", "exp_avg": "linear2", "exp_avg_sq": "log4"}
    assert names(ADAM, 1 / 10, **moments) == {"param": "linear2", "exp_avg": "linear2", "exp_avg_sq": "log4"}
    # Not one moment without the other.
    assert names(ADAM, 1 / 16, **moments) == {"param": "linear2"}
    assert names(ADAM, 1 / 64, **moments) == {}
    assert names(("param", "momentum_buffer"), 1 / 8, momentum_buffer=True) == {
        "param": "linear4",
        "momentum_buffer": "linear2",
    }
    assert names(("param", "sum"), 1 / 8, sum=False) == {"param": "linear2", "sum": "log4"}
    assert names(("param",), 1 / 8) == {"param": "linear2"}
    assert names(("param",), 1.0) == {}


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_what_is_no_plain_floating_point_number_is_not_refreshed(dtype: torch.dtype) -> None:
    group = group_of("param", dtype=dtype)
    assert plan([group], state_bytes(group), {}, 0.25) == {}
