"""What a save of each method costs a training that goes on while it is written."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarks.gpt import GPTModule, new_trainer, state_bytes
from benchmarks.methods import SCAR, Async, GatedSCARCheckpoint, Method, Torch, peers
from benchmarks.report import median
from benchmarks.stall import FRACTION, plan
from benchmarks.stretches import StretchTimer, added, blocked


@dataclass(frozen=True)
class Cost:
    """What a save costs.

    Attributes:
        stall: Seconds in which the training thread stands still.
        loop: Seconds that the training takes longer until it is written; not less than the stall.
        written: Seconds until it is written.
        steps: How many steps the training makes until then.
        bytes: What is written.

    """

    stall: float
    loop: float
    written: float
    steps: float
    bytes: float


class _Watched:
    """A method that notes when each of its saves is written, while the training goes on.

    Args:
        method: Who saves.
        total: How many bytes were written so far.

    """

    def __init__(self, method: Method, total: Callable[[], int]) -> None:
        self.name, self.warm_ups, self.is_slow = method.name, method.warm_ups, False
        self.seconds: list[float] = []
        self.bytes: list[int] = []
        self._method = method
        self._total = total
        self._executor = ThreadPoolExecutor(1)
        self._written: Future[float] | None = None

    @property
    def is_written(self) -> bool:
        return self._written is not None and self._written.done()

    def save(self, trainer: pl.Trainer) -> None:
        self._before, self._started, self._written = self._total(), time.perf_counter(), None
        self._method.save(trainer)
        if isinstance(self._method, Torch | Async):
            # The others may still be staging, up to their fence, which two threads must not wait at.
            self._watch()

    def fence(self) -> None:
        self._method.fence()
        if self._written is None:
            self._watch()

    def _watch(self) -> None:
        self._written = self._executor.submit(self._seconds_to_write)

    def _seconds_to_write(self) -> float:
        self._method.wait()
        return time.perf_counter() - self._started

    def wait(self) -> None:
        assert self._written is not None
        self._written.result()

    def discard(self, counts: bool) -> None:
        assert self._written is not None
        if counts:
            self.seconds.append(self._written.result())
            self.bytes.append(self._total() - self._before)
        self._method.discard(counts)

    def close(self) -> None:
        self._method.close()
        self._executor.shutdown()


class _UntilWritten(StretchTimer):
    """Stretches that last until their save is written, so that no time in which nobody trains counts as added."""

    @override
    def _goes_on(self) -> bool:
        return self._started is not None and isinstance(self._method, _Watched) and not self._method.is_written


def measure(
    module: GPTModule, loader: "DataLoader[Tensor]", folder: Path, rounds: int, steps: int, patience: int
) -> tuple[dict[str, Cost], dict[str, Any]]:
    """Trains, with a save of each method in every round.

    Args:
        module: The model.
        loader: What on.
        folder: Where to save.
        rounds: Saves of each method.
        steps: Optimizer steps of a stretch, at least; one with a save lasts until it is written.
        patience: How many disturbed stretches are repeated.

    Returns:
        The cost of a save of each method, and facts about the training.

    """
    callback, others = GatedSCARCheckpoint(folder / "scar", FRACTION), folder / "others"
    # Each of the others removes its save, so that all the bytes there are those of one.
    watched = [_Watched(method, lambda: _size(others)) for method in peers(others)]
    watched.append(_Watched(SCAR("scar", callback, "lazy"), lambda: callback.stats.bytes_written))
    turns, warm_up = plan([*watched], rounds)
    timer = _UntilWritten(turns, steps, lambda: None, warm_up, patience)
    trainer = new_trainer([timer, callback])
    trainer.fit(module, loader)
    stretches = timer.stretches
    step = median([stretch.wall / stretch.steps for stretch in stretches if stretch.method is None])
    found, samples = {}, {}
    for method in watched:
        method.close()
        name, seconds = method.name, method.seconds
        samples[name] = {"stall": blocked(stretches, name), "loop": added(stretches, name), "written": seconds}
        stall, loop, written = (median(values) for values in samples[name].values())
        loop = max(0.0, stall, loop)
        found[name] = Cost(max(0.0, stall), loop, written, max(0.0, written - loop) / step, median(method.bytes))
    parameters, state = state_bytes(module, trainer.optimizers[0])
    facts = {"step_s": step, "parameter_bytes": parameters, "state_bytes": state, "repeated": timer.repeated}
    return found, {**facts, "samples": samples}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
