"""For :mod:`benchmarks.tiers`: the cost of saves to memory compared with disk, and of copies during a training."""

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch.optim import Optimizer

from benchmarks import report
from benchmarks.gpt import Size, state_bytes
from benchmarks.ranks import State
from benchmarks.report import median
from benchmarks.stall import FRACTION, Floor
from benchmarks.tiers_peers import new_chain, other_process, serve, wait_for_copies
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings
from lightning_scar.core.skeleton import Path as Place

Samples = dict[str, list[float]]
Staging = Literal["eager", "lazy"]

_STAGINGS: tuple[Staging, ...] = ("eager", "lazy")
#: No save is copied from memory to disk during the measurement.
_NEVER = 1_000_000


class Saver:
    """A running checkpoint of a state in one place.

    Args:
        state: What to save.
        size: The size of its model.
        folder: Its directory.
        memory: Whether saves go to memory instead.

    """

    def __init__(self, state: State, size: Size, folder: Path, memory: bool) -> None:
        self._state = state
        self._parameters = list(state.model.parameters())
        self._tokens = torch.randint(size.vocabulary, (1, size.sequence + 1))
        settings = Settings(fraction=FRACTION, on_write_error="raise")
        in_memory = replace(settings, memory=True, durable_every_n_saves=_NEVER)
        self.running = RunningCheckpoint(folder, in_memory if memory else settings)

    def begin(self) -> None:
        """Begin a save and stage it."""
        optimizers: dict[Place, Optimizer] = {("optimizer_states", 0): self._state.optimizer}
        checkpoint = self._state.checkpoint()
        self.running.save(checkpoint, self._state.step, optimizers=optimizers, parameters=self._parameters)
        self.running.stage()

    def forward_backward(self) -> None:
        """Run a forward and backward, beside which lazy staging continues."""
        logits = self._state.model(self._tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), self._tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]

    def save(self, staging: Staging) -> tuple[float, float]:
        """Save; return how long the training thread was stalled, and how long it took until it was written."""
        # In place, although it is frozen, to measure both kinds on one store.
        object.__setattr__(self.running.settings, "staging", staging)
        before = self.running.stats.saves
        started = time.perf_counter()
        self.begin()
        if staging == "lazy":
            self.forward_backward()
        self.running.flush()
        written = time.perf_counter() - started
        assert self.running.stats.saves == before + 1, "the save was skipped"
        trouble = self.running.store.directory.trouble
        assert trouble is None, f"there was no room in memory: {trouble}"
        self._state.optimizer.zero_grad()
        return self.running.stats.stall_seconds, written

    def step(self) -> float:
        """Make a training step with a save beside it; return its seconds."""
        started = time.perf_counter()
        self.begin()
        self.forward_backward()
        self.running.fence()
        self._state.optimizer.step()
        self._state.optimizer.zero_grad()
        self._state.step += 1
        return time.perf_counter() - started


def stalls(state: State, size: Size, folder: Path, rounds: int) -> Samples:
    """Save to memory and to disk in turn, eagerly and lazily.

    Args:
        state: What to save.
        size: Of its model.
        folder: Where to.
        rounds: How often each.

    """
    savers = {tier: Saver(state, size, folder / tier, tier == "memory") for tier in ("memory", "disk")}
    floor = Floor(list(state.model.parameters()), state_bytes(state.model, state.optimizer)[1])
    order, samples = random.Random(0), dict[str, list[float]]()
    try:
        # The first save is full; then both buffers are allocated, and enlarged by their first lazy saves.
        for turn in report.counted(range(-4, rounds), 4 + rounds, "saves to memory and to disk"):
            for staging in order.sample(_STAGINGS, len(_STAGINGS)):
                # One right after the other, as other load on the machine varies.
                for tier in order.sample(list(savers), len(savers)):
                    state.move()
                    stall, written = savers[tier].save(staging)
                    if turn < 0:
                        continue
                    lazy = "lazy_" * (staging == "lazy")
                    samples.setdefault(f"{tier}_{lazy}stall_s", []).append(stall)
                    if staging == "eager":
                        samples.setdefault(f"{tier}_written_s", []).append(written)
            if turn >= 0:
                floor.measure()
    finally:
        for saver in savers.values():
            saver.running.close()
    return samples | {"floor_s": floor.samples}


def steps(
    state: State, size: Size, folder: Path, memory: Path, rounds: int, length: int
) -> tuple[Samples, dict[str, int]]:
    """Train in stretches with copies to another process and without, in turn, with a save at each step.

    Args:
        state: What to train.
        size: Of its model.
        folder: Where the directory is.
        memory: This host's memory.
        rounds: Stretches of each kind.
        length: Steps of a stretch.

    Returns:
        The samples, and what was skipped or late.

    """
    there = memory / "there"
    there.mkdir(mode=0o700)
    saver, samples = Saver(state, size, folder / "steps", memory=True), dict[str, list[float]]()
    late = 0
    with other_process(serve, there) as address, saver.running as running:
        store = running.store
        saver.save("eager")
        saver.save("lazy")
        assert store.directory.memory is not None
        chain = new_chain(store.directory.memory, folder / "steps-addresses", address)
        try:
            for turn in report.counted(range(2 * rounds), 2 * rounds, "stretches of training steps"):
                replicated = turn % 4 in (0, 3)
                running.flush()
                # Copies what the previous stretch has left.
                chain.follow()
                wait_for_copies(chain)
                store.chain = chain if replicated else None
                # The first step does not count: nothing is written beside it yet.
                took = [saver.step() for _ in range(1 + length)][1:]
                late = max(late, chain.behind)
                samples.setdefault(f"step_{'' if replicated else 'not_'}replicated_s", []).append(median(took))
            running.flush()
            wait_for_copies(chain)
        finally:
            store.chain = None
            chain.close()
    return samples, {"skipped_saves": running.stats.skipped_saves, "copies_late_saves": late}
