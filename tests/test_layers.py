"""Imports point one way: front doors -> continuation -> core -> storage, and elastic stands alone."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_scar

PACKAGE = Path(lightning_scar.__file__).parent
FRONT_DOORS = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
FORBIDDEN = {
    "core": {
        "lightning",
        "pytorch_lightning",
        "accelerate",
        "lightning_scar.continuation",
        "lightning_scar.elastic",
        *(f"lightning_scar.{name}" for name in FRONT_DOORS),
    },
    "storage": {
        "torch",
        "lightning",
        "pytorch_lightning",
        "accelerate",
        "lightning_scar.core",
        *(f"lightning_scar.{name}" for name in FRONT_DOORS),
    },
    "continuation": {
        "lightning",
        "pytorch_lightning",
        "accelerate",
        *(f"lightning_scar.{name}" for name in FRONT_DOORS),
    },
    "elastic": {
        "lightning",
        "pytorch_lightning",
        "accelerate",
        "lightning_scar.continuation",
        "lightning_scar.core",
        "lightning_scar.storage",
        *(f"lightning_scar.{name}" for name in FRONT_DOORS),
    },
}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_a_layer_imports_nothing_from_above(layer: str) -> None:
    modules = list((PACKAGE / layer).glob("*.py"))
    assert modules
    for path in modules:
        for name in imported(path):
            above = [bad for bad in FORBIDDEN[layer] if name == bad or name.startswith(bad + ".")]
            assert not above, f"{path.relative_to(PACKAGE)} imports {name}"


def test_no_module_grows_beyond_reading() -> None:
    long = {path.name: n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_lightning_is_imported_by_its_front_door_only() -> None:
    program = (
        "import sys, lightning_scar, lightning_scar.cli, lightning_scar.core.running_checkpoint; "
        "assert not {'lightning', 'accelerate'} & set(sys.modules); "
        "lightning_scar.SCARCheckpoint; assert 'lightning' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
