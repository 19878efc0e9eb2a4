"""One place has one name, whatever leads there; with real bind mounts, in a mount namespace of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_scar.storage.mounts import place_of

PRINT_PLACE = "import sys; from lightning_scar.storage.mounts import place_of; print(place_of(sys.argv[1]))"


def place_when(path: Path, *mounts: tuple[Path, Path]) -> str:
    """The place of a path where folders are mounted at others."""
    return place_after("".join(f"mount --bind '{source}' '{target}' && " for source, target in mounts), path)


def place_after(mounting: str, path: Path) -> str:
    command = f"{mounting}'{sys.executable}' -c '{PRINT_PLACE}' '{path}'"
    try:
        done = subprocess.run(["unshare", "--mount", "sh", "-c", command], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if "not permitted" in done.stderr or "ermission denied" in done.stderr:
        pytest.skip("nothing can be mounted here")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_volumes_mounted_at_the_same_path_are_different_places(tmp_path: Path) -> None:
    first, second, at = (tmp_path / name for name in ("first volume", "second", "at"))
    for folder in (first, second, at):
        folder.mkdir()
    assert place_when(at / "run", (first, at)) == place_of(str(first / "run"))
    assert place_when(at / "run", (second, at)) == place_of(str(second / "run"))
    assert place_when(at / "run", (first, at), (second, at)) == place_of(str(second / "run")), "the last one counts"
    assert place_of(str(first / "run")) != place_of(str(second / "run")) != place_of(str(at / "run"))


def test_volumes_without_a_name_of_their_own_are_different_places(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    mounting = f"mount -t tmpfs tmpfs '{first}' && mount -t tmpfs tmpfs '{second}' && "
    assert place_after(mounting, first / "run") != place_after(mounting, second / "run")


def test_a_link_is_where_it_leads(tmp_path: Path) -> None:
    os.symlink(tmp_path, tmp_path / "link")
    assert place_of(str(tmp_path / "link" / "run")) == place_of(str(tmp_path / "run"))
    assert place_of(str(tmp_path / "run")) != place_of(str(tmp_path))
