"""What README, CONTRIBUTING and docs/ name is there, and says the same as the code."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from lightning_scar import SCARDDPStrategy

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
#: How paths of this repository begin; pages name files of users, too.
OURS = re.compile(
    r"^(?:lightning_scar|core|storage|elastic|continuation|lightning|loops|tests|examples|docs|benchmarks)/"
)


def paths(page: Path) -> Iterator[str]:
    """The files of this repository that a page names."""
    for name in re.findall(r"`([\w./-]+\.(?:py|md|yaml|toml|txt|png))`", page.read_text()):
        if OURS.match(name):
            yield name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    missing = {
        name for name in paths(page) if not any((base / name).exists() for base in (ROOT, ROOT / "lightning_scar"))
    }
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def table(page: str, option: str) -> dict[str, str]:
    """The options and defaults of the table that begins with an option."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| `{option}`"))
    rows = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        _, name, default, *_ = (cell.strip().strip("`") for cell in line.split("|"))
        rows[name] = default
    return rows


def test_the_table_of_the_strategys_options_is_that_of_the_code() -> None:
    parameters = inspect.signature(SCARDDPStrategy).parameters
    known = {name: p.default for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    documented = table("continuation.md", "on_failure")
    assert {name: default.strip('"') for name, default in documented.items()} == {n: str(d) for n, d in known.items()}


def test_a_stranger_finds_what_there_is_to_find() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for thing in (
        "which blocks get written",
        "what is in a delta",
        "where NaN is refused",
        "who decides that a worker hangs",
        "what a replacement gets from a survivor",
        "where Lightning's private API is touched",
    ):
        assert f"| {thing} | `" in text


def test_tools_of_a_commit_are_those_of_make_check() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    (remote, _) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert remote["rev"] == f"v{pinned['ruff']}"


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="`make docs` installs what the site needs")
def test_the_site_can_be_built(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "heal_non_finite" in (tmp_path / "api" / "index.html").read_text()
