"""The benchmarks run, measure everything that is promised, and restore what was saved (small, so no figure counts)."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report

PROMISED = {
    "stall": [
        *(
            f"{method}_{what}_s"
            for method in ("scar", "torch", "async", "dcp", "eager")
            for what in ("blocked", "added")
        ),
        "floor_s",
        "scar_extra_memory_bytes",
        "scar_full_extra_memory_bytes",
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
    "rework": [
        *(f"{task}_measured_steps" for task in ("sgd", "adam")),
        *(
            f"{task}_{kind}_{what}"
            for task in ("sgd", "adam")
            for kind in ("estimate", "bound")
            for what in ("steps", "off_by_steps", "off_by_at_most_steps", "ratio")
        ),
    ],
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", PROMISED)
def test_a_benchmark_measures_what_is_promised(name: str, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    module, *extra = name.split()
    options = [*extra, "--small", "--rounds", "1", "--json", str(out), "--dir", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *options],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert run.returncode == 0, run.stderr
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
