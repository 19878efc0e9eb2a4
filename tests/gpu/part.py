"""One part, in a process of its own: ``python -m tests.gpu --part MODULE:FUNCTION ...``. Its last line is JSON."""

import argparse
import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


class Skipped(Exception):
    """The part cannot be shown here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """How a part runs.

    Attributes:
        device: ``cuda``, or ``cpu`` to try the part itself.
        is_quick: Whether it is only to be tried.
        folder: An empty folder, for large files, too.
    """

    device: str
    is_quick: bool
    folder: Path

    @property
    def is_on_card(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Part:
    """What can be shown.

    Attributes:
        name: Its name.
        shows: What it shows.
        call: ``module:function``; the function gets a :class:`Setting` and returns figures.
        seconds: Its limit.
        is_alone: Whether it measures, so that nothing else may run beside it.
        tells: The figures for the table.
    """

    name: str
    shows: str
    call: str
    seconds: float
    is_alone: bool = False
    tells: tuple[str, ...] = ()


def outcome(call: str, setting: Setting) -> dict[str, Any]:
    """What comes of it, as JSON has it: its state, and figures or why it has none."""
    try:
        if setting.is_on_card:
            require_card()
        return {"state": "passed", "figures": _function(call)(setting)}
    except Skipped as why:
        return {"state": "skipped", "why": str(why)}
    except Exception as error:
        traceback.print_exc()
        # What it found is told, too, where it had come so far.
        return {"state": "failed", "why": _first_line(error), "figures": getattr(error, "figures", {})}


def require_card() -> None:
    """Fail where a card is asked for and none is there."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device; --device cpu tries the parts without")


def _function(call: str) -> Callable[[Setting], dict[str, Any]]:
    module, name = call.split(":")
    found: Callable[[Setting], dict[str, Any]] = getattr(import_module(module), name)
    return found


def _first_line(error: Exception) -> str:
    text = str(error) if isinstance(error, NotShown) else f"{type(error).__name__}: {error}"
    return text.split("\n")[0][:300]


class NotShown(AssertionError):
    """What must hold does not.

    Args:
        message: What.
        figures: What was found nevertheless.

    """

    def __init__(self, message: str, figures: dict[str, Any]) -> None:
        super().__init__(message)
        self.figures = figures


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part")
    parser.add_argument("--device")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    found = outcome(options.part, Setting(options.device, options.quick, options.folder))
    print(json.dumps(found), flush=True)
    return int(found["state"] == "failed")
