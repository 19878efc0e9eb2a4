"""How long an eager save stalls each of several ranks: ``python -m benchmarks.stall --ranks 2 --json OUT``.

Ranks are processes with gloo on the loopback, each with one torch thread and the same state, as in DDP. All of them
save their shares at the same moment, so they compete for memory bandwidth. Alternating with this, one rank saves
everything alone, with one thread, while the others wait. Between two saves every parameter moves, its rows by different
amounts. A save is repeated if other processes used the machine meanwhile.
"""

import json
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes
from torch.optim import Optimizer

from benchmarks import report
from benchmarks.gpt import GPT, GPT2_SMALL, TINY, Size, state_bytes
from benchmarks.report import Target, median
from benchmarks.stretches import QUIET, user_seconds
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings
from lightning_scar.core.skeleton import Path as Place

FRACTION = 0.125
#: Partial saves that do not count: they allocate both staging buffers.
_WARM_UP = 2
#: Full saves that count, after the first, which also copies the parameters.
_FULL_SAVES = 3
#: Seconds after which a rank gives up waiting for another, and after which all are killed.
_PATIENCE, _LIMIT = 120, 1800
#: At most this many disturbed saves are repeated, after this many seconds; later ones count as they are.
_REPEATED, _PAUSE = 100, 4

#: Who saves: all ranks their shares, or the first one everything.
Way = Literal["ranks", "one_rank"]


class Turn(NamedTuple):
    """One save."""

    way: Way
    full: bool
    counts: bool


def plan(rounds: int) -> list[Turn]:
    """Plan both ways once per round, in changing order; full saves first.

    Args:
        rounds: Partial saves of each way that count.

    """
    kinds = [(True, i > 0) for i in range(1 + _FULL_SAVES)] + [(False, i >= _WARM_UP) for i in range(_WARM_UP + rounds)]
    ways: tuple[Way, Way] = ("ranks", "one_rank")
    return [Turn(way, *kind) for i, kind in enumerate(kinds) for way in (ways if i % 2 else reversed(ways))]


class State:
    """A model and its Adam state, equal on all ranks, without training.

    Args:
        size: The model's dimensions.

    """

    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = GPT(size)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step = 0

    @torch.no_grad()
    def move(self) -> None:
        """Simulate an optimizer step, which writes to everything and moves few rows far and many a little."""
        self.step += 1
        for parameter, moments in self.optimizer.state.items():
            amount = torch.rand(len(parameter), *[1] * (parameter.dim() - 1)).pow_(4).mul_(1e-2)
            parameter.addcmul_(amount, moments["exp_avg"])
            moments["exp_avg"].neg_()
            moments["exp_avg_sq"].mul_(0.999)

    def checkpoint(self) -> dict[str, Any]:
        """Return the live state as a checkpoint dict of Lightning's shape."""
        return {
            "state_dict": self.model.state_dict(),
            "optimizer_states": [self.optimizer.state_dict()],
            "global_step": self.step,
        }


@dataclass
class Sample:
    """One save on one rank.

    Attributes:
        way: Which ranks saved.
        full: Whether it was a full save.
        blocked: Seconds for which the training thread was stalled.
        written: Bytes of the files.

    """

    way: Way
    full: bool
    blocked: float
    written: int


class Saver:
    """One rank's part of a running checkpoint.

    Args:
        state: What to save.
        folder: Where to save.
        ranks: The ranks that save.

    """

    def __init__(self, state: State, folder: Path, ranks: Ranks) -> None:
        self._state = state
        self._running = RunningCheckpoint(folder, Settings(fraction=FRACTION, staging="eager"), ranks=ranks)

    def save(self, turn: Turn) -> Sample:
        """Save, and wait until everything is written."""
        checkpoint, before = self._state.checkpoint(), self._running.stats.bytes_written
        optimizers: dict[Place, Optimizer] = {("optimizer_states", 0): self._state.optimizer}
        parameters = list(self._state.model.parameters())
        started = time.perf_counter()
        self._running.save(checkpoint, self._state.step, optimizers=optimizers, parameters=parameters, full=turn.full)
        self._running.stage()
        self._running.fence()
        blocked = time.perf_counter() - started
        while self._running._writer.depth:
            time.sleep(0.001)
        return Sample(turn.way, turn.full, blocked, self._running.stats.bytes_written - before)

    @property
    def copy_bytes(self) -> int:
        """The bytes of the bases, a copy of the parameters."""
        bases = self._running._stager.bases
        values = [bases.values(group) for group in bases.map.groups]
        return sum(each.nbytes for each in values if each is not None)

    def close(self) -> None:
        """Release the directory."""
        self._running.close()


class _Clock:
    """Tells all ranks whether other processes used the machine. Constructor and method are collectives.

    Args:
        ranks: All ranks.

    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._started, self._others = self._read()

    def _read(self) -> tuple[float, float]:
        now = self._ranks.gather((time.perf_counter(), *user_seconds()))
        return now[0][0], now[0][1] - sum(own for *_, own in now)

    def is_disturbed(self) -> bool:
        """Return whether they have done so since the construction."""
        now, others = self._read()
        return others - self._others > QUIET * (now - self._started)


def _rank(rank: int, world_size: int, size: Size, folder: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=_PATIENCE),
    )
    state, ranks = State(size), Ranks.of_default_group()
    savers: dict[Way, Saver] = {"ranks": Saver(state, folder / "ranks", ranks)}
    if rank == 0:
        savers["one_rank"] = Saver(state, folder / "one_rank", Ranks())
    samples, repeated = _samples(state, savers, ranks, rounds, 0 if size == TINY else _REPEATED)
    copies = {way: saver.copy_bytes for way, saver in savers.items()}
    for saver in savers.values():
        saver.close()
    facts = dict(zip(("parameter_bytes", "state_bytes"), state_bytes(state.model, state.optimizer), strict=True))
    facts["repeated_saves"] = repeated
    result = {"samples": [asdict(sample) for sample in samples], "copy_bytes": copies, "facts": facts}
    _result(folder, rank).write_text(json.dumps(result))
    dist.destroy_process_group()


def _samples(
    state: State, savers: dict[Way, Saver], ranks: Ranks, rounds: int, patience: int
) -> tuple[list[Sample], int]:
    """Return the saves of one rank that count, and how many were repeated."""
    samples: list[Sample] = []
    repeated, turns = 0, deque(plan(rounds))
    while turns:
        turn, clock = turns[0], _Clock(ranks)
        if ranks.rank == 0:
            kind = "full" if turn.full else "partial"
            report.progress(f"{len(turns)} saves to come: a {kind} one by {turn.way.replace('_', ' ')}")
        state.move()
        dist.barrier()
        own = [savers[turn.way].save(turn)] if turn.way in savers else []
        if turn.counts and clock.is_disturbed() and repeated < patience:
            repeated += 1
            time.sleep(_PAUSE)
            continue
        samples += own if turn.counts else []
        turns.popleft()
    return samples, repeated


def _result(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def run(size: Size, world_size: int, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Run the plan on several processes.

    Args:
        size: The model.
        world_size: The number of processes.
        folder: Where to save.
        rounds: Partial saves of each way that count.

    Returns:
        The results of each rank, by rank.

    Raises:
        TimeoutError: If they do not finish.

    """
    arguments = (world_size, size, folder, rounds)
    ranks = start_processes(_rank, arguments, world_size, join=False, daemon=True)  # type: ignore[no-untyped-call]
    deadline = time.monotonic() + _LIMIT
    try:
        while not ranks.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{world_size} ranks have not finished in {_LIMIT} s")
    finally:
        for process in ranks.processes:
            process.kill()
    return [json.loads(_result(folder, rank).read_text()) for rank in range(world_size)]


def figures(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return medians and ratios; the slowest rank, or the one with most bytes, counts."""
    samples = [[Sample(**sample) for sample in result["samples"]] for result in results]

    def by_rank(way: Way, what: str, full: bool) -> list[list[float]]:
        kept = [[float(getattr(s, what)) for s in own if s.way == way and s.full == full] for own in samples]
        return [own for own in kept if own]

    found: dict[str, Any] = {}
    all_samples: dict[str, list[list[float]]] = {}
    kinds = {
        "eager_blocked_s": ("blocked", False),
        "full_blocked_s": ("blocked", True),
        "written_bytes": ("written", False),
    }
    for name, kind in kinds.items():
        ranks, one = by_rank("ranks", *kind), by_rank("one_rank", *kind)
        # Align the ranks' samples of one save: it is over when the last rank is done.
        found[name] = median([max(save) for save in zip(*ranks, strict=True)])
        found[f"{name}_by_rank"] = [median(own) for own in ranks]
        found[f"one_rank_{name}"] = median(one[0])
        all_samples |= {name: ranks, f"one_rank_{name}": one}
    found["copy_bytes_by_rank"] = [result["copy_bytes"]["ranks"] for result in results]
    found["copy_bytes"] = max(found["copy_bytes_by_rank"])
    found["one_rank_copy_bytes"] = results[0]["copy_bytes"]["one_rank"]
    for name in (*kinds, "copy_bytes"):
        found[f"{name.removesuffix('_s')}_over_one_rank"] = found[name] / found[f"one_rank_{name}"]
    return {**found, **results[0]["facts"], "samples": all_samples}


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Return the table."""
    table = []
    for name in ("eager_blocked_s", "full_blocked_s", "copy_bytes", "written_bytes"):
        is_time = name.endswith("_s")
        each = [found[f"one_rank_{name}"], *found[f"{name}_by_rank"]]
        words = [f"{value:.4f}" if is_time else f"{value / 1e6:.1f}" for value in each]
        unit = "s" if is_time else "MB"
        title = name.removesuffix("_s").removesuffix("_bytes").replace("_", " ")
        table.append([f"{title}, {unit}", *words, f"{found[name.removesuffix('_s') + '_over_one_rank']:.3f}"])
    return table


def measure(world_size: int, quick: bool, rounds: int, parent: Path | None, out: str | None) -> None:
    """Measure, print and write JSON.

    Args:
        world_size: The number of ranks.
        quick: Whether to use the tiny model.
        rounds: Partial saves of each way that count.
        parent: Where to put a temporary folder.
        out: The JSON file, if any.

    """
    with report.scratch(parent) as folder:
        found = figures(run(TINY if quick else GPT2_SMALL, world_size, folder.resolve(), rounds))
    found |= {"ranks": world_size, "settings": {"fraction": FRACTION, "rounds": rounds, "threads_per_rank": 1}}
    # Half the work, plus a little that every rank has to do; more ranks than cores wait for each other.
    aims = [Target("eager_blocked_over_one_rank", found["eager_blocked_over_one_rank"], 0.65)]
    aims = aims if world_size == 2 and not quick else []
    columns = ["a save", "one rank", *(f"rank {rank} of {world_size}" for rank in range(world_size)), "ratio"]
    title = f"one save of {found['state_bytes'] / 1e9:.2f} GB by {world_size} ranks at once, and by one"
    report.show(title, columns, rows(found), aims)
    report.write(out, found, aims)
