"""A training loop split into stretches, with one save or with none, so that the difference is the cost of a save."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning.pytorch as pl
import psutil
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from benchmarks import report
from benchmarks.gpt import GPTModule
from benchmarks.methods import Method
from benchmarks.report import median

#: Cores that other processes may use in a stretch that counts. If they use more, torch's threads wait for each other,
#: and steps take several times longer, regardless of saves.
QUIET = 0.1
#: Steps of a stretch with a save that takes far longer than the variation of steps.
_SHORT = 2
#: Seconds between two lines of progress, at least.
_TELL_EVERY = 2.0


def user_seconds() -> tuple[float, float]:
    """Return the user time of all processes, including what the hypervisor stole, and of this process."""
    everyone = psutil.cpu_times()
    # Without system time: kernel threads that write to the disk for us would count as other processes.
    return everyone.user + everyone.nice + getattr(everyone, "steal", 0.0), psutil.Process().cpu_times().user


class _Clocks(NamedTuple):
    """Seconds, each from an arbitrary origin."""

    wall: float
    computing: float
    forward_backward: float
    others: float

    @classmethod
    def at_rest(cls, module: GPTModule) -> "_Clocks":
        """Return the clocks when the device has done all that was queued."""
        if module.device.type != "cpu":
            torch.accelerator.synchronize(module.device)
        return cls.now(module)

    @classmethod
    def now(cls, module: GPTModule) -> "_Clocks":
        """Return the clocks of the training thread."""
        everyone, own = user_seconds()
        return cls(time.perf_counter(), module.computing.seconds, module.forward_backward.seconds, everyone - own)


@dataclass(frozen=True)
class Stretch:
    """Measurements of one stretch of the loop.

    Attributes:
        method: The method that saved at its beginning; ``None`` for none.
        steps: Its optimizer steps.
        wall: Seconds from its first step until everything is computed and written after its last.
        idle: Seconds outside forward, backward and update in the training thread, without that wait.
        forward_backward: Mean seconds of forward and backward per step.

    """

    method: str | None
    steps: int
    wall: float
    idle: float
    forward_backward: float


class StretchTimer(Callback):
    """Follows a plan of saves, one at the beginning of each stretch, and stops the training at the end of the plan.

    Between stretches, outside the measured time, it removes old files and lets the disk settle, so that no method pays
    for the one before it. A stretch during which other processes used the machine is repeated.

    Args:
        plan: The method that saves at the beginning of each stretch; ``None`` for none.
        steps: Optimizer steps of a stretch.
        between: Called between stretches.
        warm_up: How many stretches at the beginning do not count. They are as short as possible and never repeated.
        patience: How many stretches are repeated at most; later ones count as they are.

    Attributes:
        stretches: The measured stretches, without the warm-up.
        repeated: How many stretches were repeated.

    """

    def __init__(
        self,
        plan: Sequence[Method | None],
        steps: int,
        between: Callable[[], None],
        warm_up: int = 0,
        patience: int = 0,
    ) -> None:
        self.stretches: list[Stretch] = []
        self.repeated = 0
        self._warm_up = warm_up
        self._told = 0.0
        self._done = 0
        self._plan = plan
        self._steps = steps
        self._between = between
        self._patience = patience
        self._batches = 0
        self._started: _Clocks | None = None

    @property
    def _method(self) -> Method | None:
        return self._plan[self._done]

    @property
    def _least(self) -> int:
        """The minimal steps of the current stretch."""
        if self._started is None:
            return 1
        if self._done < self._warm_up or (self._method is not None and self._method.is_slow):
            return min(_SHORT, self._steps)
        return self._steps

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._started is not None and self._method is not None:
            self._method.fence()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, GPTModule)
        self._batches += 1
        if self._batches < self._least or self._goes_on():
            return
        if self._started is not None:
            self._finish(pl_module, self._started)
        if self._done == len(self._plan):
            self._started = None
            trainer.should_stop = True
            return
        self._between()
        os.sync()
        self._batches = 0
        self._started = _Clocks.at_rest(pl_module)
        if self._method is not None:
            self._method.save(trainer)

    def _goes_on(self) -> bool:
        """Return whether the stretch continues beyond its minimal steps."""
        return False

    def _finish(self, module: GPTModule, started: _Clocks) -> None:
        looped = _Clocks.now(module)
        if self._method is not None:
            self._method.wait()
        written = _Clocks.at_rest(module)
        stretch = Stretch(
            method=self._method.name if self._method is not None else None,
            steps=self._batches,
            wall=written.wall - started.wall,
            idle=(looped.wall - started.wall) - (looped.computing - started.computing),
            forward_backward=(looped.forward_backward - started.forward_backward) / self._batches,
        )
        is_warm, others = self._done >= self._warm_up, (written.others - started.others) / stretch.wall
        is_over = not is_warm or others <= QUIET or self.repeated == self._patience
        if self._method is not None:
            self._method.discard(is_over and is_warm)
        what = "no save" if self._method is None else self._method.name
        note = "" if is_over else f", again: others used {others:.2f} cores"
        if not is_over or time.monotonic() - self._told > _TELL_EVERY:
            self._told = time.monotonic()
            report.progress(f"stretch {self._done + 1} of {len(self._plan)}: {what}, {stretch.wall:.2f} s{note}")
        if is_over and is_warm:
            self.stretches.append(stretch)
        self._done += is_over
        self.repeated += not is_over


def blocked(stretches: Sequence[Stretch], method: str) -> list[float]:
    """Return how much longer the training thread was idle in each stretch with a save of the method than without."""
    usual = median([stretch.idle / stretch.steps for stretch in stretches if stretch.method is None])
    return [stretch.idle - stretch.steps * usual for stretch in stretches if stretch.method == method]


def added(stretches: Sequence[Stretch], method: str) -> list[float]:
    """Return how much longer each stretch with a save of the method took than as many steps without one beside it."""
    return [
        here.wall - here.steps * (before.wall + after.wall) / (before.steps + after.steps)
        for before, here, after in zip(stretches, stretches[1:], stretches[2:], strict=False)
        if here.method == method and before.method is None and after.method is None
    ]
