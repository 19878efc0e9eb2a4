"""How much memory saves need, measured as the peak of a separate process: ``python -m benchmarks.memory``."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from benchmarks import report
from benchmarks.gpt import GPT2_SMALL, TINY, GPTModule, Size, new_trainer, state_bytes, token_loader
from benchmarks.methods import GatedSCARCheckpoint

#: Steps without a save, before the peak counts and while it does.
_WARM_UP, _BASELINE = 4, 4
#: Enough that both staging buffers have been used and a compaction has run.
_PARTIAL_SAVES = 12


class _Sampler(threading.Thread):
    """Samples this process's memory without file mappings.

    The kernel's peak includes files that are mapped for reading. Their pages belong to the page cache, which holds them
    just the same when a file is read normally.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._stopped = threading.Event()

    @override
    def run(self) -> None:
        while not self._stopped.wait(0.003):
            self.peak = max(self.peak, _status("RssAnon") + _status("RssShmem"))

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self.join()


class _PeakOfPhases(Callback):
    """Records the peak of a few steps without a save, of the full save, and of partial saves."""

    def __init__(self, callback: GatedSCARCheckpoint, sampler: _Sampler) -> None:
        self._callback = callback
        self._sampler = sampler
        self._batches = 0
        self.peaks: dict[str, int] = {}
        self.peaks_with_files: dict[str, int] = {}

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._batches += 1
        step = self._batches - _WARM_UP
        if step == 0:
            self._reset()
        elif step == _BASELINE:
            self._note("baseline")
            self._callback.is_open = True
        elif step == _BASELINE + 1:
            self._callback.wait()
            self._note("full")
        elif step == _BASELINE + 2:
            # A batch later: the writer thread frees the memory of the full save after it has finished.
            self._reset()
            self._callback.is_open = True
        elif step > _BASELINE + 2:
            self._callback.wait()
            report.progress(f"memory: partial save {step - _BASELINE - 2} of {_PARTIAL_SAVES}")
            self._callback.is_open = step < _BASELINE + 2 + _PARTIAL_SAVES
            if not self._callback.is_open:
                self._note("partial")
                trainer.should_stop = True

    def _note(self, phase: str) -> None:
        self.peaks[phase], self.peaks_with_files[phase] = self._sampler.peak, _status("VmHWM")
        self._reset()

    def _reset(self) -> None:
        self._sampler.peak = 0
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(size: Size, folder: Path, fraction: float) -> dict[str, int]:
    """Train and save in this process.

    Args:
        size: The model.
        folder: Where to save.
        fraction: The fraction of a partial save.

    Returns:
        Extra bytes of partial and of full saves at their peaks, and what partial saves may take.

    """
    callback = GatedSCARCheckpoint(folder / "scar", fraction)
    sampler = _Sampler()
    phases = _PeakOfPhases(callback, sampler)
    module = GPTModule(size)
    trainer = new_trainer([phases, callback])
    sampler.start()
    trainer.fit(module, token_loader(size))
    sampler.stop()
    parameters, state = state_bytes(module, trainer.optimizers[0])
    with_files = phases.peaks_with_files
    return {
        "scar_extra_memory_bytes": phases.peaks["partial"] - phases.peaks["baseline"],
        "scar_full_extra_memory_bytes": phases.peaks["full"] - phases.peaks["baseline"],
        "scar_extra_memory_with_mapped_files_bytes": with_files["partial"] - with_files["baseline"],
        "scar_extra_memory_bound_bytes": int(parameters + 2.5 * fraction * state),
        "parameter_bytes": parameters,
        "state_bytes": state,
    }


def measure_in_child(quick: bool, folder: Path) -> dict[str, int]:
    """Measure in a fresh process, where nothing has grown the heap before.

    Args:
        quick: Whether to use the tiny model.
        folder: Where to save.

    """
    out = folder / "memory.json"
    command = [sys.executable, "-m", "benchmarks.memory", "--json", str(out), "--dir", str(folder)]
    # Otherwise memory that the allocator keeps blurs the measurement: equal runs gave anything from 926 to 990 MB.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command += ["--quick"] if quick else []
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    figures: dict[str, int] = json.loads(out.read_text())
    out.unlink()
    return figures


def main() -> None:
    """Measure and write JSON."""
    options = report.arguments(__doc__ or "", rounds=1).parse_args()
    with report.scratch(options.dir) as folder:
        figures = measure(TINY if options.quick else GPT2_SMALL, folder, fraction=0.125)
    print(json.dumps(figures, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
