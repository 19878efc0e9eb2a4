"""Which samples a resumed run repeats and skips: ``python -m benchmarks.samples --json OUT``.

A run over 160 samples in batches of 4 saves at every step and dies in the middle of its second epoch. A new process,
with another seed, resumes it. Counted are the samples of that epoch that are served twice, and those that never are,
over all ranks. Beside it the same with Lightning's ``ModelCheckpoint``, and with Accelerate's ``save_state``,
``load_state`` and ``skip_first_batches``. And the seconds to a first batch at the beginning of an epoch of ten million
samples, and deep inside it.
"""

import contextlib
import io
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from benchmarks import processes, report
from benchmarks.report import Target
from lightning_scar import SCARAccelerator, SCARCheckpoint, SCARLoop
from lightning_scar.core.data_order import EpochOrder

SAMPLES, BATCH = 160, 4
#: The part of the second epoch after which the run dies.
DIES_AFTER = 0.375


class Numbers(Dataset[Tensor]):
    """Samples that are their own indices."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor([float(i)])


class Stream(IterableDataset[Tensor]):
    """The same without a length, with a state."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.done = 0

    @override
    def __iter__(self) -> Iterator[Tensor]:
        for i in range(self.done, SAMPLES // self.ranks):
            self.done = i + 1
            yield torch.tensor([float(i * self.ranks + self.rank)])
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        """Return the place."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there."""
        self.done = state["done"]


def _shuffled(loader: Any = DataLoader, **options: Any) -> Callable[[int, int], Any]:
    return lambda rank, ranks: loader(Numbers(), BATCH, shuffle=True, **options)


def _weighted(rank: int, ranks: int) -> Any:
    return DataLoader(Numbers(), BATCH, sampler=WeightedRandomSampler([1.0] * SAMPLES, SAMPLES, replacement=False))


#: Make a loader, given a rank and the number of ranks that divide the data themselves.
LOADERS: dict[str, Callable[[int, int], Any]] = {
    "shuffled": _shuffled(),
    "shuffled, with a generator": lambda rank, ranks: _shuffled(generator=torch.Generator())(rank, ranks),
    "shuffled, two workers": _shuffled(num_workers=2),
    "with a `DistributedSampler`": lambda rank, ranks: DataLoader(
        Numbers(), BATCH, sampler=DistributedSampler(Numbers(), ranks, rank)
    ),
    "`StatefulDataLoader`, shuffled": _shuffled(StatefulDataLoader),
    "weighted": _weighted,
    "without a length": lambda rank, ranks: StatefulDataLoader(Stream(rank, ranks), BATCH),
}

#: The front doors by name: what runs one process, and the number of processes.
DOORS: dict[str, tuple[str, int]] = {
    "Trainer": ("trainer", 1),
    "`ddp`": ("trainer", 2),
    "Accelerate": ("accelerate", 1),
    "Accelerate, two processes": ("accelerate", 2),
    "a plain loop": ("plain", 1),
}


class _Crash(Exception):
    """The end of the first process."""


class _Model(pl.LightningModule):
    def __init__(self, note: Callable[[int, Tensor], None]) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.note = note

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.note(self.current_epoch, batch)
        return self.layer(batch / SAMPLES).square().mean()  # type: ignore[no-any-return]

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(folder: Path, loader: Any, side: str, is_first: bool, note: Callable[[int, Tensor], None]) -> None:
    """Train with a Trainer, and its checkpoints or ours."""
    if side == "scar":
        callback: Any = SCARCheckpoint(folder / "scar", every_n_train_steps=1, **_OPTIONS)
    else:
        callback = ModelCheckpoint(folder / "peer", every_n_train_steps=1, save_last=True)
    resumed = folder / "peer" / "last.ckpt" if side == "peer" and not is_first else None
    pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size() if dist.is_initialized() else 1,
        strategy="ddp" if dist.is_initialized() else "auto",
        callbacks=[callback],
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(_Model(note), loader, ckpt_path=resumed)


def accelerate(folder: Path, loader: Any, side: str, is_first: bool, note: Callable[[int, Tensor], None]) -> None:
    """Train with Accelerate, and its checkpoints or ours."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
    model = nn.Linear(1, 1)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01), loader)
    if side == "scar":
        _loop(
            SCARAccelerator(accelerator, folder / "scar", every_n_steps=1, **_OPTIONS), model, optimizer, loader, note
        )
        return
    length = SAMPLES // BATCH // accelerator.num_processes
    done = 0 if is_first else int((folder / "done").read_text())
    if not is_first:
        accelerator.load_state(str(folder / "peer"))
    for epoch in range(done // length, 2):
        skipped = done % length
        for batch in accelerator.skip_first_batches(loader, skipped) if skipped else loader:
            _step(model, optimizer, batch, epoch, note)
            done += 1
            accelerator.save_state(str(folder / "peer"))
            (folder / "done").write_text(str(done))


def plain(folder: Path, loader: Any, side: str, is_first: bool, note: Callable[[int, Tensor], None]) -> None:
    """Train in a loop of one's own, with our checkpoints."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    _loop(
        SCARLoop(folder / "scar", {"model": model, "optimizer": optimizer}, every_n_steps=1, **_OPTIONS),
        model,
        optimizer,
        loader,
        note,
    )


#: Full saves, because others are skipped while the disk is slow.
_OPTIONS: dict[str, Any] = {"fraction": 1.0, "full_every_n_saves": 1, "save_on_exception": False}


def _loop(scar: SCARLoop, model: nn.Module, optimizer: Any, loader: Any, note: Callable[[int, Tensor], None]) -> None:
    with scar:
        scar.resume()
        for epoch in range(scar.epoch, 2):
            for batch in scar.batches(loader):
                _step(model, optimizer, batch, epoch, note)
                scar.step()


def _step(model: nn.Module, optimizer: Any, batch: Tensor, epoch: int, note: Callable[[int, Tensor], None]) -> None:
    note(epoch, batch)
    model(batch / SAMPLES).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _rank(rank: int, door: str, ranks: int, folder: Path, loader: str, side: str, is_first: bool) -> None:
    """Run one process, and write down what it sees."""
    warnings.filterwarnings("ignore")
    served: list[tuple[int, list[int]]] = []
    dies_at = int(SAMPLES / BATCH / ranks * (1 + DIES_AFTER)) if is_first else -1

    def note(epoch: int, batch: Tensor) -> None:
        if len(served) == dies_at:
            raise _Crash
        served.append((epoch, [int(i) for i in batch.flatten()]))

    torch.manual_seed(1 + is_first)
    # Accelerate divides the data itself.
    data = LOADERS[loader](*((0, 1) if door == "accelerate" else (rank, ranks)))
    with contextlib.suppress(_Crash), contextlib.redirect_stderr(io.StringIO()):
        {"trainer": trainer, "accelerate": accelerate, "plain": plain}[door](folder, data, side, is_first, note)
    (folder / f"{side}-{is_first}-{rank}.json").write_text(json.dumps(served))


def measure(door: str, ranks: int, folder: Path, loader: str, side: str) -> tuple[int, int]:
    """Return the numbers of samples that are repeated, and skipped, in the epoch that was cut short."""
    counts = [0] * SAMPLES
    for is_first in (True, False):
        processes.run(_rank, ranks, folder, door, ranks, folder, loader, side, is_first)
        for rank in range(ranks):
            for epoch, indices in json.loads((folder / f"{side}-{is_first}-{rank}.json").read_text()):
                for i in indices if epoch == 1 else ():
                    counts[i] += 1
    return sum(count - 1 for count in counts if count > 1), counts.count(0)


def deep(samples: int) -> tuple[float, float]:
    """Return the seconds to the first batch of a shuffled epoch, and to one behind nine tenths of it."""
    loader: DataLoader[int] = DataLoader(range(samples), batch_size=64, shuffle=True)  # type: ignore[arg-type]
    order = EpochOrder(loader)
    seconds = []
    for done in (0, len(loader) * 9 // 10):
        order.begin_at(order.state(), done)
        started = time.perf_counter()
        next(iter(loader))
        seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1]


def main() -> None:
    """Measure, print and write JSON."""
    parser = report.arguments((__doc__ or "").split("\n")[0], rounds=1)
    options = parser.parse_args()
    loaders = list(LOADERS)[:1] if options.quick else list(LOADERS)
    doors = list(DOORS)[:1] if options.quick else list(DOORS)
    figures: dict[str, Any] = {"settings": {"samples": SAMPLES, "batch": BATCH, "dies_after": DIES_AFTER}}
    rows, worst = [], 0
    for loader in loaders:
        row = [loader]
        for name in doors:
            door, ranks = DOORS[name]
            cells = []
            for side in ("scar",) if door == "plain" else ("scar", "peer"):
                report.progress(f"{loader}; {name}; {side}")
                with report.scratch(options.dir) as folder:
                    repeated, skipped = measure(door, ranks, folder, loader, side)
                figures[f"{side}_{door}_{ranks}_{loader}"] = [repeated, skipped]
                worst = max(worst, repeated + skipped) if side == "scar" else worst
                cells.append(f"{repeated} + {skipped}")
            row.append("; ".join(cells))
        rows.append(row)
    figures["scar_repeated_or_skipped"] = worst
    report.progress("the middle of a long epoch")
    figures["begin_s"], figures["deep_s"] = deep(100_000 if options.quick else 10_000_000)
    targets = [
        Target("scar_repeated_or_skipped", worst, 0),
        Target("deep_s - begin_s, 10 M samples", figures["deep_s"] - figures["begin_s"], 1),
    ]
    report.show("samples repeated + skipped: lightning-scar; the framework's own", ["loader", *doors], rows, targets)
    report.write(options.json, figures, targets)


if __name__ == "__main__":
    main()
