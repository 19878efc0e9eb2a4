"""What a save costs in a loop with Accelerate: ``python -m benchmarks.loops --json OUT``.

One loop runs stretches of a few steps, in turn without a save, with one save of ``SCARAccelerator``, and with one
``accelerator.save_state``. ``*_blocked_s`` is how long the save stalled the training thread (including the fence),
``*_added_s`` how much longer the whole stretch took until everything was written. SCAR fsyncs, Accelerate does not.
"""

import shutil
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from benchmarks import report
from benchmarks.gpt import GPT, GPT2_SMALL, TINY, Size, state_bytes, token_loader
from benchmarks.report import median
from benchmarks.stall import FRACTION, Floor
from lightning_scar import SCARAccelerator

METHODS = ("scar", "save_state")


class Loop:
    """A GPT with Adam, trained as Accelerate's users do.

    Args:
        size: The model's size.
        folder: Where to save.

    """

    def __init__(self, size: Size, folder: Path) -> None:
        self.accelerator = Accelerator(cpu=True)
        self.scar = SCARAccelerator(self.accelerator, folder / "scar", every_n_steps=1, fraction=FRACTION)
        model = GPT(size)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        self.model, self.optimizer, loader = self.accelerator.prepare(model, optimizer, token_loader(size))
        self._batches = cycle([batch for _, batch in zip(range(64), loader, strict=False)])
        self._folder = folder
        self.scar.resume()

    def step(self) -> None:
        """Make one step, without a save."""
        batch = next(self._batches)
        logits = self.model(batch[:, :-1])
        self.accelerator.backward(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def stretch(self, method: str | None, steps: int) -> tuple[float, float]:
        """Make steps, with a save after the first.

        Args:
            method: The method that saves; ``None`` for no save.
            steps: The number of steps.

        Returns:
            Seconds for all of it, and those for which the save stalled the training thread.

        """
        began = time.perf_counter()
        blocked = 0.0
        for i in range(steps):
            self.step()
            if i == 0 and method == "save_state":
                started = time.perf_counter()
                self.accelerator.save_state(str(self._folder / "state"))
                blocked = time.perf_counter() - started
            elif i == 0 and method == "scar":
                self.scar.step()
        if method == "scar":
            assert self.scar._running is not None
            self.scar._running.flush()
            blocked = self.scar.stats.stall_seconds
        seconds = time.perf_counter() - began
        shutil.rmtree(self._folder / "state", ignore_errors=True)
        return seconds, blocked


def run(size: Size, folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Train through all rounds and return the figures.

    Args:
        size: The model's size.
        folder: Where to save.
        rounds: How often each method saves.
        steps: Steps of a stretch.

    """
    loop = Loop(size, folder)
    for method in (None, *METHODS, "scar"):  # The first save is full, and all allocate their buffers.
        loop.stretch(method, steps)
    parameters, state = state_bytes(loop.model, loop.optimizer)
    floor = Floor(list(loop.model.parameters()), state)
    samples: dict[str, list[float]] = {f"{m}_{kind}_s": [] for m in METHODS for kind in ("blocked", "added")}
    plain: list[float] = []
    for number in range(rounds):
        for method in METHODS:
            report.progress(f"round {number + 1} of {rounds}: {method}")
            before, _ = loop.stretch(None, steps)
            seconds, blocked = loop.stretch(method, steps)
            after, _ = loop.stretch(None, steps)
            plain += [before, after]
            samples[f"{method}_blocked_s"].append(blocked)
            samples[f"{method}_added_s"].append(seconds - (before + after) / 2)
        floor.measure()
    loop.scar.close()
    samples["floor_s"] = floor.samples
    found = {name: median(values) for name, values in samples.items()}
    found |= {"stretch_s": median(plain), "parameter_bytes": parameters, "state_bytes": state}
    for kind in ("blocked", "added"):
        found[f"scar_{kind}_over_save_state"] = found[f"scar_{kind}_s"] / found[f"save_state_{kind}_s"]
    found["scar_blocked_over_floor"] = found["scar_blocked_s"] / found["floor_s"]
    return {**found, "samples": samples}


def main() -> None:
    """Measure, print and write JSON."""
    options = report.arguments((__doc__ or "").split("\n")[0], rounds=7).parse_args()
    rounds, steps = options.rounds or (2 if options.quick else 7), 3
    with report.scratch(options.dir) as folder:
        found = run(TINY if options.quick else GPT2_SMALL, folder, rounds, steps)
    found["settings"] = {"fraction": FRACTION, "rounds": rounds, "steps": steps}
    rows = [[name, f"{found[f'{name}_blocked_s']:.4f}", f"{found[f'{name}_added_s']:.3f}"] for name in METHODS]
    rows.append(["floor", f"{found['floor_s']:.4f}", ""])
    report.show(f"one save of {found['state_bytes'] / 1e9:.2f} GB", ["method", "blocked s", "added s"], rows, [])
    report.write(options.json, found, [])


if __name__ == "__main__":
    main()
