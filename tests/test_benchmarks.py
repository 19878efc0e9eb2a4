"""The benchmarks run, measure everything that is promised, and restore what was saved (small, so no figure counts)."""

import json
import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prepared
import pytest

from benchmarks import moonclip_peer, report, stall
from benchmarks.methods import peers

PROMISED = {
    "stall": [
        *(
            f"{method}_{what}_s"
            for method in ("scar", "torch", "async", "dcp", "dcp_overlapped", "eager")
            for what in ("blocked", "added")
        ),
        "floor_s",
        "scar_extra_memory_bytes",
        "scar_full_extra_memory_bytes",
        *(f"scar_{what}_over_{peer}" for what in ("blocked", "added") for peer in ("torch", "async", "dcp")),
    ],
    "stall --ranks 2": [
        *(f"{prefix}{what}" for prefix in ("", "one_rank_") for what in ("eager_blocked_s", "full_blocked_s")),
        *(f"{what}_over_one_rank" for what in ("eager_blocked", "full_blocked", "copy_bytes", "written_bytes")),
    ],
    "loops": [
        *(f"{method}_{what}_s" for method in ("scar", "save_state") for what in ("blocked", "added")),
        "floor_s",
        "scar_blocked_over_save_state",
    ],
    "resume": [f"{source}_{what}" for source in ("scar", "torch", "safetensors") for what in ("s", "cold_s")],
    "samples": ["scar_repeated_or_skipped", "begin_s", "deep_s"],
    "resume_table": ["cells", "cells_behind"],
    "choice": [f"distance_of_{ranks}_ranks_over_one_{size}_byte_blocks" for ranks in (2, 4, 8) for size in (512, 2048)],
    "rework": [
        *(f"{task}{kind}_measured_steps" for task in ("sgd", "adam") for kind in ("", "_refresh")),
        *(f"{task}_refresh_estimate_off_by_steps" for task in ("sgd", "adam")),
        *(
            f"{task}_{kind}_{what}"
            for task in ("sgd", "adam")
            for kind in ("estimate", "bound")
            for what in ("steps", "off_by_steps", "off_by_at_most_steps", "ratio")
        ),
    ],
}

#: Those whose figures are what others measure, in more ways or for longer.
LONG = ("stall --ranks 2", "choice", "rework", "resume_table")


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in PROMISED]
)
def test_a_benchmark_measures_what_is_promised(name: str, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    module, *extra = name.split()
    # No test goes to the network.
    extra += ["--moonclip", "no"] if name == "stall" else []
    options = [*extra, "--quick", "--rounds", "1", "--json", str(out), "--dir", str(tmp_path)]
    run = prepared.run(
        [sys.executable, "-m", f"benchmarks.{module}", *options],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=380,
    )
    assert run.returncode == 0, run.stderr
    # It says what it is at.
    assert run.stderr.strip()
    figures: dict[str, Any] = json.loads(out.read_text())
    for key in PROMISED[name]:
        assert math.isfinite(figures[key]), key
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dir", "missing"], "argument --dir: there is no folder 'missing': make it first"),
        (["--json", "missing/figures.json"], "argument --json: there is no folder 'missing': make it first"),
        (["--json", "."], "argument --json: '.' is a folder: name a file"),
    ],
)
def test_where_things_cannot_go_is_said_before_anything_is_measured(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        report.arguments("", rounds=1).parse_args(flags)
    assert said in capsys.readouterr().err


class Manager:
    """What moonclip's manager is like."""

    def __init__(self, root: str, **options: Any) -> None:
        self.root, self.options, self.said = Path(root), options, list[object]()

    def save(self, step: int, model: object, optimizer: object) -> None:
        self.said.append(step)

    def flush(self) -> None:
        self.said.append("flushed")


def test_moonclip_is_used_from_a_folder_of_its_own(tmp_path: Path) -> None:
    package = tmp_path / "peer" / "moonclip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"from {Manager.__module__} import Manager as CheckpointManager")
    sys.modules.pop("moonclip", None)
    before = list(sys.path)
    found = moonclip_peer.methods(str(package.parent), tmp_path)
    assert [method.name for method in found] == ["moonclip", "moonclip_bf16"]
    assert sys.path == before
    for method, save_dtype in zip(found, (None, "bf16"), strict=True):
        assert isinstance(method, moonclip_peer.Moonclip)
        assert method._manager.options["save_dtype"] == save_dtype
        trainer: Any = SimpleNamespace(model=None, optimizers=[None])
        for _ in range(2):
            method.save(trainer)
            method.wait()
        assert method._manager.said == [1, "flushed", 2, "flushed"]
    sys.modules.pop("moonclip", None)


def test_without_moonclip_the_others_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert moonclip_peer.methods("no", tmp_path) == []
    sys.modules.pop("moonclip", None)
    assert moonclip_peer.methods(str(tmp_path), tmp_path) == []
    assert "moonclip 0.3.1 is not available and is left out: No module named 'moonclip'" in capsys.readouterr().err


def test_every_method_is_measured_between_two_stretches_without_a_save(tmp_path: Path) -> None:
    methods = peers(tmp_path)
    turns, warm_up = stall.plan(methods, rounds=3)
    assert turns[:warm_up] == [method for method in methods for _ in range(method.warm_ups)]
    measured = turns[warm_up:]
    assert set(measured[::2]) == {None}
    assert Counter(measured[1::2]) == dict.fromkeys(methods, 3)
