"""Imports point one way: front doors -> continuation, core and elastic; core -> storage; elastic stands alone."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_scar

ROOT = Path(lightning_scar.__file__).parent.parent
PACKAGE = ROOT / "lightning_scar"
FRONT_DOORS = {
    "lightning_scar.lightning",
    "lightning_scar.loops",
    *(f"lightning_scar.{path.stem}" for path in PACKAGE.glob("[!_]*.py")),
}
FRAMEWORKS = {"lightning", "pytorch_lightning", "accelerate"}
FORBIDDEN = {
    "lightning": {"accelerate", "lightning_scar.loops"},
    "loops": {"lightning", "pytorch_lightning", "lightning_scar.lightning"},
    "continuation": {*FRAMEWORKS, *FRONT_DOORS},
    "core": {*FRAMEWORKS, *FRONT_DOORS, "lightning_scar.continuation", "lightning_scar.elastic"},
    "storage": {*FRAMEWORKS, *FRONT_DOORS, "torch", "lightning_scar.core"},
    "elastic": {
        *FRAMEWORKS,
        *FRONT_DOORS,
        "lightning_scar.continuation",
        "lightning_scar.core",
        "lightning_scar.storage",
    },
    "elastic/protocol": {"lightning_scar.elastic.worker", "lightning_scar.elastic.supervisor"},
    "elastic/worker": {"lightning_scar.elastic.prepared", "lightning_scar.elastic.supervisor"},
    "elastic/prepared": {"lightning_scar.elastic.supervisor"},
}


def imported(path: Path) -> Iterator[tuple[str, str | None]]:
    """Returns what a file imports, wherever in it: inside functions and for type checkers, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            assert node.module is not None
            yield from ((node.module, f"{node.module}.{alias.name}") for alias in node.names)


def imports(package: str) -> dict[str, set[str]]:
    """Returns for each module of a package which other ones of it it imports."""
    paths = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = {}
    for module, path in paths.items():
        names = {name if name in paths else source for source, name in imported(path)}
        found[module] = names & set(paths) - {module}
    return found


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_a_layer_imports_nothing_from_above(layer: str) -> None:
    modules = list((PACKAGE / layer).rglob("*.py"))
    assert modules
    for path in modules:
        for source, member in imported(path):
            name = member or source
            above = [bad for bad in FORBIDDEN[layer] if f"{name}.".startswith(f"{bad}.")]
            assert not above, f"{path.relative_to(PACKAGE)} imports {name}"


@pytest.mark.parametrize("package", ["lightning_scar", "benchmarks"])
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    waiting = imports(package)
    while free := {module for module, needed in waiting.items() if not needed & set(waiting)}:
        for module in free:
            del waiting[module]
    assert not waiting, "each of these imports another one, in a circle or on the way to one"


def test_no_module_grows_beyond_reading() -> None:
    long = {path.name: n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_torch_and_lightning_are_imported_by_who_needs_them_only() -> None:
    run(
        "import sys, lightning_scar, lightning_scar.__main__, lightning_scar.elastic.supervisor.command_line; "
        # A supervisor imports torch while the process that forks its workers does.
        "assert 'torch' not in sys.modules; "
        "import lightning_scar.cli, lightning_scar.core.running_checkpoint; "
        "lightning_scar.SCARLoop; "
        "assert not {'lightning', 'accelerate'} & set(sys.modules); "
        "lightning_scar.SCARCheckpoint; assert 'lightning' in sys.modules"
    )


USE = """
from lightning.pytorch.strategies import StrategyRegistry
trainer = lightning.Trainer(strategy="scar_ddp", accelerator="cpu", devices=1, logger=False)
assert type(trainer.strategy) is lightning_scar.SCARDDPStrategy
assert "scar_ddp" in StrategyRegistry.available_strategies()
"""


@pytest.mark.parametrize(
    "order",
    [
        "import lightning_scar, lightning",
        pytest.param("import lightning, lightning_scar", marks=pytest.mark.slow),
        pytest.param("import lightning.pytorch.strategies, lightning_scar, lightning", marks=pytest.mark.slow),
        "import lightning_scar, importlib; importlib.reload(lightning_scar); import lightning",
    ],
)
def test_the_name_of_the_strategy_is_known_whatever_is_imported_first(order: str) -> None:
    run(order + USE)
