"""What several tests of this folder need."""

from pathlib import Path

import pytest

from lightning_scar.storage.host_memory import VARIABLE


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for the memory of a host."""
    folder = tmp_path / "host"
    folder.mkdir()
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "scar")
