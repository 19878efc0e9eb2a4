"""What the parts run on."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from gpu.part import Setting

#: What decides about figures.
_PACKAGES = ("torch", "lightning", "accelerate", "numpy", "safetensors", "triton")


def facts(setting: Setting) -> dict[str, Any]:
    """The card, its driver, and the versions of all that matters; on the CPU without the first two."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in _PACKAGES},
    }
    if not setting.is_on_card:
        return found
    properties = torch.cuda.get_device_properties(0)
    found |= {
        "card": properties.name,
        "cards": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        "driver": _driver(),
    }
    # It computes.
    ones = torch.ones(64, 64, device="cuda")
    assert float((ones @ ones).sum()) == 64**3
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
