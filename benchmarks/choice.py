"""The cost of choosing blocks on every rank independently: ``python -m benchmarks.choice --json OUT``.

Each rank spends an eighth of its own bytes on the blocks of its own share. One ranking of all blocks would need an
exchange of scores at every save. The measure is how far the running checkpoint lags behind: the mean distance after a
save, in a training of a CNN on handwritten digits, over that of one ranking. All numbers of ranks share one training.
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
from lightning_scar.core.live_state import Dissection, LiveState
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.save import Part, Save
from lightning_scar.core.selection import Candidates
from lightning_scar.core.settings import Settings
from lightning_scar.core.shares import shares
from lightning_scar.core.skeleton import Path
from lightning_scar.core.stager import Stager
from lightning_scar.storage.head import Version

WORLD_SIZES = (1, 2, 4, 8)
EVERY = 5


def _furthest(candidates: Candidates) -> Tensor:
    """Rank by L2 distance, which is what is compared, not in the metric of Adam's preconditioner."""
    return candidates.distance.square() / candidates.nbytes


class Shared:
    """A running checkpoint divided over several ranks, of which nothing is written.

    Args:
        world_size: The number of ranks.

    """

    def __init__(self, world_size: int) -> None:
        # Without a refresh: what is compared is the choice of the exact blocks.
        settings = Settings(fraction=FRACTION, policy=_furthest, staging="eager", refresh=None)
        self._ranks = [Stager(settings, {}) for _ in range(world_size)]
        self.distances: list[float] = []

    def save(self, state: LiveState, step: int) -> None:
        """Save what each rank chooses; the first save is full and does not count."""
        squares = [self._save_share(rank, state, step) for rank in range(len(self._ranks))]
        if step > EVERY:
            self.distances.append(sum(squares) ** 0.5)

    def _save_share(self, rank: int, state: LiveState, step: int) -> float:
        stager, own = self._ranks[rank], shares(state.map, len(self._ranks))[rank]
        live = state.of(own)
        stager.bases.fit(own, live)
        parts = [Part(group, tensors) for group, tensors in zip(own.groups, live, strict=True)]
        save = Save(Version(0, step, step), step <= EVERY, memoryview(b""), parts)
        stager.start(save)
        stager.finish(save)
        return save.squared_rest


def run(seed: int, steps: int, block_size: int, digits: Images) -> dict[int, float]:
    """Return the mean distance for every number of ranks in one training."""
    torch.manual_seed(seed)
    model: nn.Module = cnn()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    sides = {world_size: Shared(world_size) for world_size in WORLD_SIZES}
    dissection = Dissection(Ranks(), block_size)
    for step in range(1, steps + 1):
        batch = torch.randint(len(digits.pixels), (64,))
        optimizer.zero_grad()
        cross_entropy(model(digits.pixels[batch]), digits.labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % EVERY == 0:
            checkpoint = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
            optimizers: dict[Path, Optimizer] = {("optimizer_states", 0): optimizer}
            state = dissection.take_apart(checkpoint, optimizers, model.parameters())
            for side in sides.values():
                side.save(state, step)
    return {n: sum(side.distances) / len(side.distances) for n, side in sides.items()}


def main() -> None:
    """Measure, print and write JSON."""
    options = report.arguments((__doc__ or "").split("\n")[0], rounds=5).parse_args()
    rounds, steps = (options.rounds or 2, 50) if options.quick else (options.rounds or 5, 300)
    digits = mnist()
    figures: dict[str, Any] = {"settings": {"fraction": FRACTION, "every": EVERY, "steps": steps, "rounds": rounds}}
    rows = []
    for block_size in (512, 2048):
        runs = []
        for seed in range(rounds):
            report.progress(f"blocks of {block_size} bytes, training {seed + 1} of {rounds}")
            runs.append(run(seed, steps, block_size, digits))
        for world_size in WORLD_SIZES[1:]:
            ratio = median([distances[world_size] / distances[1] for distances in runs])
            figures[f"distance_of_{world_size}_ranks_over_one_{block_size}_byte_blocks"] = ratio
            rows.append([str(world_size), str(block_size), f"{ratio:.3f}"])
    columns = ["ranks", "bytes of a block", "distance / that of one ranking"]
    report.show("every rank chooses alone", columns, rows, [])
    report.write(options.json, figures, [])


if __name__ == "__main__":
    main()
