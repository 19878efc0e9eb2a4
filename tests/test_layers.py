"""Imports point one way: front doors -> core -> storage."""

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
    "core": {"lightning", "pytorch_lightning", "accelerate", *(f"lightning_scar.{name}" for name in FRONT_DOORS)},
    "storage": {
        "torch",
        "lightning",
        "pytorch_lightning",
        "accelerate",
        "lightning_scar.core",
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


def test_core_does_not_pull_in_lightning() -> None:
    # The package's __init__ offers the Lightning front door, so this looks at the modules behind it.
    program = (
        "import sys, types; sys.path.insert(0, %r); package = types.ModuleType('lightning_scar'); "
        "package.__path__ = [%r]; sys.modules['lightning_scar'] = package; "
        "import lightning_scar.core.running_checkpoint; "
        "assert not {'lightning', 'accelerate'} & set(sys.modules)" % (str(PACKAGE.parent), str(PACKAGE))
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
