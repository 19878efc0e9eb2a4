"""The benchmark of memory as a tier measures what is promised and leaves nothing behind (small: no figure counts)."""

import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import prepared
import pytest

from benchmarks import tiers
from benchmarks.tiers_peers import memory_folder

PROMISED = [
    *(f"{tier}_{what}_s" for tier in ("memory", "disk") for what in ("stall", "lazy_stall", "written")),
    *("memory_stall_over_disk", "floor_s", "own_s", "neighbour_s", "disk_warm_s", "disk_cold_s", "copy_s"),
    *("own_over_disk_cold", "own_over_disk_warm", "replication_bytes_per_s", "socket_bytes_per_s"),
    *("replication_over_socket", "step_replicated_over_not", "state_bytes"),
    *("step_replicated_over_not_from", "step_replicated_over_not_to"),
]


def started(tmp_path: Path, memory: Path) -> "subprocess.Popen[str]":
    memory.mkdir(exist_ok=True)
    options = ["--quick", "--rounds", "1", "--json", str(tmp_path / "figures.json"), "--dir", str(tmp_path)]
    return prepared.PreparedPopen(
        [sys.executable, "-m", "benchmarks.tiers", *options],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "LIGHTNING_SCAR_MEMORY": str(memory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_it_measures_what_is_promised(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    run = started(tmp_path, memory)
    _, said = run.communicate(timeout=380)
    assert run.returncode == 0, said
    figures: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    for key in PROMISED:
        assert math.isfinite(figures[key]), key
    assert "Warning" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "memory"]
    assert not list(memory.iterdir())


def test_what_a_killed_one_leaves_in_memory_is_removed_by_the_next(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    run = started(tmp_path, memory)
    deadline = time.monotonic() + 60
    while not list(memory.rglob("*.safetensors")):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.kill()
    run.communicate()
    assert list(memory.iterdir())
    with memory_folder(memory) as fresh:
        assert list(memory.iterdir()) == [fresh]


def test_it_says_what_is_missing(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.write_text("a file")
    run = prepared.run(
        [sys.executable, "-m", "benchmarks.tiers", "--quick", "--dir", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "LIGHTNING_SCAR_MEMORY": str(memory)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 1
    assert "set LIGHTNING_SCAR_MEMORY to one in memory" in run.stderr


def test_the_ratio_that_is_printed_is_that_of_pairs_where_there_are_any() -> None:
    pairs = {"memory_stall_over_disk": 2.0, "memory_lazy_stall_over_disk": 3.0, "step_replicated_over_not": 4.0}
    ratios = [row[-1] for row in tiers._rows(defaultdict(lambda: 1.0, pairs))]
    assert ratios == ["2.00", "3.00", *["1.00"] * 6, "4.00"]
