"""Registers ``Trainer(strategy="scar_ddp")`` without importing Lightning, which not every user needs.

Lightning has no entry point for strategies. So the strategy is registered at once if Lightning is imported already, and
otherwise at the end of its import.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "scar_ddp"

#: The module of Lightning's registry.
_MODULE = "lightning.pytorch.strategies"


def register() -> None:
    """Register the strategy now, or as soon as Lightning is imported."""
    module = sys.modules.get(_MODULE)
    if hasattr(module, "StrategyRegistry"):
        _add_to(module)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _add_to(module: Any) -> None:
    if NAME not in module.StrategyRegistry:
        module.StrategyRegistry.register(NAME, _strategy, description="DDP whose workers survive the death of others")


def _strategy(**options: Any) -> Any:
    from lightning_scar.lightning.strategy import SCARDDPStrategy

    return SCARDDPStrategy(**options)


class _AfterImport(MetaPathFinder):
    """Finds the module with the other finders, and registers the strategy after it was executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _add_to(module)

            loader.exec_module = exec_module
        return spec
