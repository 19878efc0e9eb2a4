"""How long a save stalls training, and how much time it adds: ``python -m benchmarks.stall --json OUT``.

One Trainer runs stretches of a few steps, in turn without a save and with one save of each method, so that all methods
meet the same model, the same heap and the same load on the machine. A stretch is repeated if other processes used the
machine meanwhile. A method's ``*_blocked_s`` is how much longer the training thread was idle between forward, backward
and update (including the fence); its ``*_added_s`` how much longer the whole stretch took until everything was written.
SCAR, DCP and moonclip fsync, Lightning's two do not.
"""

import argparse
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import moonclip_peer, ranks, report
from benchmarks.gpt import GPT2_SMALL, TINY, GPTModule, Size, new_trainer, state_bytes, token_loader
from benchmarks.memory import measure_in_child
from benchmarks.methods import SCAR, GatedSCARCheckpoint, Method, peers
from benchmarks.report import Target, median
from benchmarks.stretches import Stretch, StretchTimer, added, blocked

FRACTION = 0.125


def plan(methods: list[Method], rounds: int) -> tuple[list[Method | None], int]:
    """Plan every method once per round, in changing order, each between two stretches without a save.

    Args:
        methods: The methods. Each first makes some saves that do not count: SCAR's first save is full, and all of them
            allocate their buffers.
        rounds: The number of rounds.

    Returns:
        The method of each stretch, and how many stretches do not count.

    """
    order = random.Random(0)
    turns: list[Method | None] = [method for method in methods for _ in range(method.warm_ups)]
    warm_up = len(turns)
    turns.append(None)
    for _ in range(rounds):
        for method in order.sample(methods, len(methods)):
            turns += [method, None]
    return turns, warm_up


class Floor:
    """The minimal memory traffic of a partial save, on all cores and nothing else.

    Args:
        parameters: The live parameters.
        state: Bytes of the whole state.

    """

    def __init__(self, parameters: list[torch.Tensor], state: int) -> None:
        self._live = [parameter.detach().flatten() for parameter in parameters]
        self._saved = [tensor.clone() for tensor in self._live]
        share = int(FRACTION * state) // 4
        self._source, self._buffer = torch.ones(share), torch.zeros(share)
        self.samples: list[float] = []

    def measure(self) -> None:
        """Read the parameters and their saved copy, and copy a fraction of the state."""
        started = time.perf_counter()
        for live, saved in zip(self._live, self._saved, strict=True):
            torch.dot(live, saved)
        self._buffer.copy_(self._source)
        self.samples.append(time.perf_counter() - started)


def run(
    size: Size, folder: Path, rounds: int, steps: int, is_patient: bool, moonclip: str | None
) -> tuple[list[Stretch], list[SCAR], Floor, dict[str, Any]]:
    """Train according to the plan.

    Args:
        size: The model.
        folder: Where to save.
        rounds: Measurements of each method.
        steps: Optimizer steps of a stretch.
        is_patient: Whether to repeat stretches during which others used the machine, at most a quarter of them.
        moonclip: As in :func:`~benchmarks.moonclip_peer.methods`.

    Returns:
        The stretches that count, both kinds of SCAR, the floor, and facts about the state.

    """
    callback = GatedSCARCheckpoint(folder / "scar", FRACTION)
    scars = [SCAR("scar", callback, "lazy"), SCAR("eager", callback, "eager")]
    methods: list[Method] = [*scars, *peers(folder), *moonclip_peer.methods(moonclip, folder)]
    module = GPTModule(size)
    floors: list[Floor] = []

    def between() -> None:
        if not floors:
            floors.append(Floor(list(module.parameters()), state_bytes(module, trainer.optimizers[0])[1]))
        floors[0].measure()

    turns, warm_up = plan(methods, rounds)
    timer = StretchTimer(turns, steps, between, warm_up, patience=len(turns) // 4 if is_patient else 0)
    trainer = new_trainer([timer, callback])
    trainer.fit(module, token_loader(size))
    for method in methods:
        method.close()
    parameters, state = state_bytes(module, trainer.optimizers[0])
    facts: dict[str, Any] = {
        "parameter_bytes": parameters,
        "state_bytes": state,
        "full_stall_s": callback.stats.full_stall_seconds,
        "stretches": len(timer.stretches),
        "repeated_stretches": timer.repeated,
    }
    return timer.stretches, scars, floors[0], facts


def figures(stretches: list[Stretch], scars: list[SCAR], floor: Floor) -> dict[str, Any]:
    """Return medians, ratios and samples of a run."""
    names = dict.fromkeys(stretch.method for stretch in stretches if stretch.method is not None)
    found: dict[str, Any] = {}
    samples: dict[str, list[float]] = {}
    of_kind: dict[str, Callable[[list[Stretch], str], list[float]]] = {"blocked": blocked, "added": added}
    for name in names:
        for kind, measured in of_kind.items():
            samples[f"{name}_{kind}_s"] = measured(stretches, name)
    samples["floor_s"] = floor.samples
    samples |= {f"{scar.name}_stall_seconds": scar.stalls for scar in scars}
    found |= {key: median(values) for key, values in samples.items()}
    found["forward_backward_s"] = median([s.forward_backward for s in stretches if s.method is None])
    found["stretch_s"] = median([s.wall for s in stretches if s.method is None])
    for kind in of_kind:
        for peer in names:
            if peer not in ("scar", "eager"):
                found[f"scar_{kind}_over_{peer}"] = found[f"scar_{kind}_s"] / found[f"{peer}_{kind}_s"]
    found["eager_blocked_over_floor"] = found["eager_blocked_s"] / found["floor_s"]
    return {**found, "samples": samples}


def targets(found: dict[str, Any]) -> list[Target]:
    """Return the targets."""
    moonclip = [f"scar_{kind}_over_{peer}" for peer in ("moonclip", "moonclip_bf16") for kind in ("blocked", "added")]
    return [
        Target("scar_blocked_s", found["scar_blocked_s"], 0.02),
        Target("scar_blocked_over_dcp", found["scar_blocked_over_dcp"], 0.2),
        Target("scar_added_over_dcp", found["scar_added_over_dcp"], 0.5),
        Target("scar_added_over_async", found["scar_added_over_async"], 0.2),
        *(Target(name, found[name], 1.0) for name in moonclip if name in found),
        Target("eager_blocked_over_floor", found["eager_blocked_over_floor"], 1.5),
        Target("scar_extra_memory_bytes", found["scar_extra_memory_bytes"], found["scar_extra_memory_bound_bytes"]),
    ]


def _options() -> argparse.Namespace:
    parser = report.arguments((__doc__ or "").split("\n")[0], rounds=7)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a stretch (default 3)")
    parser.add_argument("--ranks", type=int, help="instead: compare N ranks that save together with one alone")
    moonclip_peer.add_argument(parser)
    return parser.parse_args()


def main() -> None:
    """Measure, print and write JSON."""
    options = _options()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    rounds = options.rounds or (2 if options.quick else 7)
    if options.ranks:
        ranks.measure(options.ranks, options.quick, rounds, options.dir, options.json)
        return
    with report.scratch(options.dir) as folder:
        report.progress("memory, in a separate process ...")
        memory = measure_in_child(options.quick, folder)
        size = TINY if options.quick else GPT2_SMALL
        # A tiny stretch is shorter than the kernel's ticks for CPU times.
        is_patient = not options.quick
        stretches, scars, floor, facts = run(size, folder, rounds, options.steps, is_patient, options.moonclip)
    found = figures(stretches, scars, floor) | facts | memory
    found["settings"] = {"fraction": FRACTION, "rounds": rounds, "steps": options.steps}
    names = dict.fromkeys(stretch.method for stretch in stretches if stretch.method is not None)
    rows = [
        [name, *(f"{found[f'{name}_{kind}_s']:.{n}f}" for kind, n in (("blocked", 4), ("added", 3)))] for name in names
    ]
    rows.append(["floor", f"{found['floor_s']:.4f}", ""])
    title = f"one save of {found['state_bytes'] / 1e9:.2f} GB, forward and backward {found['forward_backward_s']:.2f} s"
    # A tiny model's figures say nothing about the targets.
    aims = [] if options.quick else targets(found)
    report.show(title, ["method", "blocked s", "added s"], rows, aims)
    report.write(options.json, found, aims)


if __name__ == "__main__":
    main()
