"""What it costs that every rank chooses alone: ``python -m benchmarks.choice --json OUT``.

Each rank spends an eighth of its own bytes on the blocks of its own share. One ranking of all blocks would need an
exchange of scores at every save. The measure is how far the running checkpoint lags behind: the mean distance after a
save, in a training of a CNN on handwritten digits, over that of one ranking. All numbers of ranks see one training.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from benchmarks import report
from benchmarks.data import Images, mnist
from benchmarks.report import median
from benchmarks.rework import FRACTION, cnn
from lightning_scar.core.last_saved import LastSaved
from lightning_scar.core.live_state import Dissection, LiveState
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.scoring import Scorer
from lightning_scar.core.selection import Candidates
from lightning_scar.core.settings import Settings
from lightning_scar.core.shares import shares
from lightning_scar.core.skeleton import Path
from lightning_scar.core.staging import StagingBuffer, stage
from lightning_scar.storage.store import DeltaStore

WORLD_SIZES = (1, 2, 4, 8)
EVERY = 5


def _furthest(candidates: Candidates) -> Tensor:
    """By L2 distance only, as that is compared, and not in the metric of Adam's preconditioner."""
    return candidates.distance.square() / candidates.nbytes


class Shared:
    """A running checkpoint in memory, divided over so many ranks.

    Args:
        world_size: The number of ranks.

    """

    def __init__(self, world_size: int) -> None:
        self._ranks = [LastSaved() for _ in range(world_size)]
        self._scorer = Scorer(Settings(fraction=FRACTION, policy=_furthest), DeltaStore("memory://choice"))
        self.distances: list[float] = []

    def save(self, state: LiveState, step: int) -> None:
        """Saves what each rank chooses; the first save is full, and does not count."""
        squares = [self._save_share(rank, state, step) for rank in range(len(self._ranks))]
        if step > EVERY:
            self.distances.append(sum(squares) ** 0.5)

    def _save_share(self, rank: int, state: LiveState, step: int) -> float:
        last, own = self._ranks[rank], shares(state.map, len(self._ranks))[rank]
        live = state.of(own)
        if own != last.map:
            last.fit(own, live)
        budget = int(FRACTION * own.state_bytes) if step > EVERY else None
        choice = self._scorer.choose(last, live, range(len(own.groups)), step, budget, failed=())
        chosen = [(own.groups[g], live[g], numbers) for g, numbers in choice.by_group(own).items()]
        for staged in stage(StagingBuffer(), chosen):
            last.record(staged, step)
        return choice.squared_rest


def run(seed: int, steps: int, block_size: int, digits: Images) -> dict[int, float]:
    """The mean distance for every number of ranks in one training."""
    torch.manual_seed(seed)
    model: nn.Module = cnn()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    sides = {world_size: Shared(world_size) for world_size in WORLD_SIZES}
    dissection = Dissection(Ranks())
    for step in range(1, steps + 1):
        batch = torch.randint(len(digits.pixels), (64,))
        optimizer.zero_grad()
        cross_entropy(model(digits.pixels[batch]), digits.labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % EVERY == 0:
            checkpoint = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
            optimizers: dict[Path, Optimizer] = {("optimizer_states", 0): optimizer}
            state = dissection.take_apart(checkpoint, optimizers, model.parameters(), block_size)
            for side in sides.values():
                side.save(state, step)
    return {n: sum(side.distances) / len(side.distances) for n, side in sides.items()}


def main() -> None:
    """Measures, prints and writes JSON."""
    options = report.arguments((__doc__ or "").split("\n")[0], rounds=5).parse_args()
    rounds, steps = (options.rounds or 2, 50) if options.small else (options.rounds or 5, 300)
    digits = mnist()
    figures: dict[str, Any] = {"settings": {"fraction": FRACTION, "every": EVERY, "steps": steps, "rounds": rounds}}
    rows = []
    for block_size in (512, 2048):
        runs = [run(seed, steps, block_size, digits) for seed in range(rounds)]
        for world_size in WORLD_SIZES[1:]:
            ratio = median([distances[world_size] / distances[1] for distances in runs])
            figures[f"distance_of_{world_size}_ranks_over_one_{block_size}_byte_blocks"] = ratio
            rows.append([str(world_size), str(block_size), f"{ratio:.3f}"])
    columns = ["ranks", "bytes of a block", "distance / that of one ranking"]
    report.show("every rank chooses alone", columns, rows, [])
    report.write(options.json, figures, [])


if __name__ == "__main__":
    main()
