"""What is built installs into a clean environment, is complete, and runs README's first example."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: What README leaves to the reader, and what makes the run a short one.
BEFORE = """
from functools import partial
import lightning
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

lightning.Trainer = partial(lightning.Trainer, max_epochs=1, limit_train_batches=4, accelerator="cpu", logger=False)
model, datamodule = BoringModel(), BoringDataModule()
"""
AFTER = """
if trainer.global_rank == 0:
    import lightning_scar
    print("imported from", lightning_scar.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    run(
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "-t",
        "wheel",
        "-d",
        folder,
        cwd=folder / source.name[: -len(".tar.gz")],
    )
    return folder


@pytest.fixture(scope="module")
def clean_python(built: Path) -> Path:
    """The interpreter of a new environment that has the wheel, and nothing else of this repository."""
    environment = built / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=built)
    python = environment / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=built).strip()
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", own, wheel, cwd=built)
    # The dependencies as they are here. Files with paths, such as that of an editable install, do not count in there.
    (Path(own) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_the_wheel_has_all_modules_and_is_typed(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_scar").rglob("*.py")}
    assert here <= packed
    assert "lightning_scar/py.typed" in packed
    assert {name.split("/")[0] for name in packed} == {"lightning_scar", "lightning_scar-0.1.0.dist-info"}


def test_the_source_has_what_development_needs(built: Path) -> None:
    (folder,) = (path for path in built.iterdir() if path.is_dir() and path.name.startswith("lightning_scar-"))
    for name in ("Makefile", "constraints.txt", "mkdocs.yml", "CONTRIBUTING.md", "tests/conftest.py", "docs/demo.png"):
        assert (folder / name).exists()


def test_the_installed_command_runs(clean_python: Path, tmp_path: Path) -> None:
    assert "inspect" in run(clean_python, "-m", "lightning_scar", "--help", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_first_example_of_readme_runs(clean_python: Path, tmp_path: Path) -> None:
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert "devices=4" in example
    # Four workers on two cores would only take longer.
    (tmp_path / "train.py").write_text(BEFORE + example.replace("devices=4", "devices=2") + AFTER)
    printed = run(clean_python, "train.py", cwd=tmp_path)
    assert f"imported from {clean_python.parents[1]}" in printed
    found = run(clean_python, "-m", "lightning_scar", "inspect", "runs/a/scar", cwd=tmp_path)
    assert "4" in re.findall(r"(?i)step\D+(\d+)", found), found
