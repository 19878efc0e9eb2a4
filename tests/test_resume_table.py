"""Each cell of the table in docs/resume.md is what a run in real processes, which really die, comes to."""

import json
import sys
from pathlib import Path

import prepared
import pytest

from benchmarks.resume_table import DOORS, SITUATIONS

ROOT = Path(__file__).parents[1]


def cells() -> dict[tuple[str, str], str]:
    """What the page says of each situation and front door."""
    lines = (ROOT / "docs" / "resume.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {next(iter(SITUATIONS))} |"))
    found = {}
    for line in lines[first : first + len(SITUATIONS)]:
        _, name, *row, _ = (cell.strip() for cell in line.split("|"))
        found |= {(name, door): cell.split("**")[1] for door, cell in zip(DOORS, row, strict=True) if cell}
    return found


CELLS = cells()
#: Each situation in one front door, in turn; the others are left to `make test-all`.
CHOSEN = [(name, situation.doors[i % len(situation.doors)]) for i, (name, situation) in enumerate(SITUATIONS.items())]


def test_the_page_has_each_cell() -> None:
    assert set(CELLS) == {(name, door) for name, situation in SITUATIONS.items() for door in situation.doors}
    assert len({name for name, _ in CHOSEN}) == len(SITUATIONS)
    assert {door for _, door in CHOSEN} == {*DOORS}


@pytest.mark.parametrize(
    ("name", "door"), [pytest.param(*cell, marks=[] if cell in CHOSEN else [pytest.mark.slow]) for cell in CELLS]
)
def test_a_cell_is_as_the_page_says(name: str, door: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--only", name, "--door", door, "--side", "scar", "--json", str(out), "--dir", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.resume_table", *options]
    run = prepared.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert json.loads(out.read_text())[f"scar, {door}, {name}"] == CELLS[name, door]
