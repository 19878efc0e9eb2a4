"""What a save costs on a card: time, device memory; and what restoring costs. Beside torch's and Lightning's own."""

import shutil
import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpt import GPT2_SMALL_ON_DEVICE, GPT_1_3B, TINY, GPTModule, Size, new_trainer, state_bytes, token_loader
from benchmarks.methods import DCP, SCAR, Async, GatedSCARCheckpoint, Method
from benchmarks.report import median
from benchmarks.stall import FRACTION, plan
from benchmarks.stretches import Stretch, StretchTimer, added, blocked
from gpu.part import Setting, Skipped
from lightning_scar import load

#: How many times the state: the running checkpoint at its largest, a save of it, and the file of a peer.
_ON_DISK = 5
#: With gradients, what SCAR keeps, and a peer's copy; and bytes for what lies between forward and backward.
_ON_CARD, _BESIDE = 3, 20e9


def small(setting: Setting) -> dict[str, Any]:
    """Saves of GPT-2 small under Adam in float32."""
    return _measured(setting, TINY if setting.is_quick else GPT2_SMALL_ON_DEVICE, rounds=2 if setting.is_quick else 5)


def large(setting: Setting) -> dict[str, Any]:
    """Saves of 1.3 B parameters in bfloat16 with moments in float32."""
    size = replace(TINY, dtype=torch.bfloat16) if setting.is_quick else GPT_1_3B
    return _measured(setting, size, rounds=2)


class MemoryTimer(StretchTimer):
    """Notes the device memory that each stretch takes at most.

    Attributes:
        peaks: By the method that saved, bytes of each stretch; ``None`` for no save.

    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.peaks: dict[str | None, list[int]] = {}

    def _finish(self, module: GPTModule, started: Any) -> None:
        method = self._method
        super()._finish(module, started)
        if module.device.type == "cuda":
            name = None if method is None else method.name
            self.peaks.setdefault(name, []).append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()


def _measured(setting: Setting, size: Size, rounds: int) -> dict[str, Any]:
    _require_room(setting, size)
    callback = GatedSCARCheckpoint(setting.folder / "scar", FRACTION)
    pinned = setting.is_on_card
    methods: list[Method] = [
        SCAR("scar", callback, "lazy"),
        DCP(setting.folder, pinned=pinned),
        DCP(setting.folder, overlapped=True, pinned=pinned),
        Async(setting.folder),
    ]
    turns, warm_up = plan(methods, rounds)
    # The first one is before any save: what SCAR keeps on the device is not there yet.
    timer = MemoryTimer([None, *turns], 4, lambda: None, warm_up + 1)
    module = GPTModule(size, setting.device)
    trainer = new_trainer([timer, callback], setting.device)
    trainer.fit(module, token_loader(size))
    for method in methods:
        method.close()
    parameters, state = state_bytes(module, trainer.optimizers[0])
    names = [method.name for method in methods]
    return {
        "parameter_bytes": parameters,
        "state_bytes": state,
        "full_stall_s": callback.stats.full_stall_seconds,
        **_times(timer.stretches, names),
        **_memory(timer.peaks, names),
        "restore_s": _restored(setting, size),
    }


def _require_room(setting: Setting, size: Size) -> None:
    state = (size.dtype.itemsize + 8) * (
        12 * size.layers * size.width**2 + (size.vocabulary + size.positions) * size.width
    )
    need = _ON_DISK * state
    if (free := shutil.disk_usage(setting.folder).free) < need:
        raise Skipped(f"{need / 1e9:.0f} GB on the disk are needed, {free / 1e9:.0f} GB are free: choose another --dir")
    need = _ON_CARD * state + _BESIDE
    if setting.is_on_card and (free := torch.cuda.mem_get_info()[0]) < need:
        raise Skipped(f"{need / 1e9:.0f} GB on the card are needed, {free / 1e9:.0f} GB are free")


def _times(stretches: list[Stretch], names: list[str]) -> dict[str, float]:
    plain = [stretch.wall / stretch.steps for stretch in stretches if stretch.method is None]
    found = {"step_s": median(plain)}
    for name in names:
        found[f"{name}_blocked_s"] = median(blocked(stretches, name))
        found[f"{name}_added_s"] = median(added(stretches, name))
    return found


def _memory(peaks: dict[str | None, list[int]], names: list[str]) -> dict[str, int]:
    """Bytes on the device: what SCAR keeps there, and what a save of each method takes besides at its peak."""
    if not peaks:
        return {}
    first, *others = peaks[None]
    usual = max(others)
    kept = {"scar_kept_bytes": usual - first}
    return kept | {f"{name}_extra_bytes": max(peaks[name]) - usual for name in names}


def _restored(setting: Setting, size: Size) -> float:
    """Seconds until the weights are on the device again, from the disk's cache."""
    module = GPTModule(size, setting.device)
    began = time.perf_counter()
    load(setting.folder / "scar", into={"state_dict": module.state_dict()})
    if setting.is_on_card:
        torch.cuda.synchronize()
    return time.perf_counter() - began
