"""Loops of Accelerate in one process: saved, cut short, resumed; and what is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_blocks_as_lived, assert_same
from loop_runs import WAYS, Loop, train

PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "objects", "global_step")


def of(checkpoint: dict[str, Any], *more: str) -> dict[str, Any]:
    return {part: checkpoint[part] for part in (*PARTS, *more)}


def assert_done(*loops: Loop) -> None:
    for loop in loops:
        assert loop.error is None, loop.error


def test_nothing_of_lightning_is_imported() -> None:
    program = (
        "import sys; from lightning_scar import SCARAccelerator, SCARLoop; "
        "assert not {'lightning', 'pytorch_lightning', 'lightning_fabric'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "random numbers"])
@pytest.mark.parametrize("after", [5, 16, 23])
def test_a_resumed_loop_ends_as_an_uninterrupted_one(way: str, after: int, tmp_path: Path) -> None:
    whole = train(0, tmp_path / "whole", way=way)
    first = train(0, tmp_path / "cut", way=way, after=after)
    second = train(0, tmp_path / "cut", way=way)
    assert_done(whole, first, second)
    # With accumulation it goes on behind the last whole step.
    done = len(whole.seen) - len(second.seen)
    assert after - 2 <= done <= after
    assert first.seen[:done] + second.seen == whole.seen
    assert_same(of(second.final), of(whole.final))


def test_random_numbers_go_on_at_an_epochs_end(tmp_path: Path) -> None:
    """In the middle of one, the loader draws a number more when it is begun anew."""
    whole = train(0, tmp_path / "whole", way="random numbers")
    train(0, tmp_path / "cut", way="random numbers", after=16)
    second = train(0, tmp_path / "cut", way="random numbers")
    assert_same(of(second.final, "random"), of(whole.final, "random"))


def test_blocks_are_as_they_were_at_their_steps(tmp_path: Path) -> None:
    options = {"fraction": 0.3, "block_size": 64, "full_every_n_saves": None}
    loop = train(0, tmp_path, after=20, way="an average of the weights", scar=options)
    assert_done(loop)
    assert len(assert_blocks_as_lived(tmp_path, loop.live)) > 1
