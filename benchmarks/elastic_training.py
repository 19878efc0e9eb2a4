"""The training that the benchmarks of failures kill: ``python -m benchmarks.elastic_training --folder DIR``.

It runs as a plain script (``--strategy scar_ddp`` starts the supervisor), under ``lightning-scar run``, and under
torchrun with ``--strategy ddp``, which then saves checkpoints and resumes from the last one. Imports are few: a
replacement's start-up is part of what is measured.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from typing_extensions import override

from benchmarks.step_log import StepLog
from benchmarks.timeline import Timeline

Batch = tuple[Tensor, Tensor]
#: Steps that no epoch reaches.
_ENDLESS = 10_000


class Cycled(Dataset[Batch]):
    """A data set that is repeated, so that an epoch takes long.

    Args:
        data: The data set.
        length: The apparent number of samples.

    """

    def __init__(self, data: TensorDataset, length: int) -> None:
        self._data = data
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        images, labels = self._data[index % len(self._data)]
        return images, labels


class Classifier(pl.LightningModule):
    """A perceptron.

    Args:
        options: The command line.

    """

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options
        self.timeline: Timeline | None = None
        width = options.width
        self.layers = nn.Sequential(
            *(nn.Flatten(), nn.Linear(784, width), nn.ReLU()),
            *(nn.Linear(width, width), nn.ReLU(), nn.Dropout(options.dropout), nn.Linear(width, 10)),
        )

    @override
    def training_step(self, batch: Batch) -> Tensor:
        if self.timeline is not None:
            self.timeline.note("own" if dist.is_initialized() else "alone")
        # Simulates computing on an accelerator: the machine has fewer cores than workers.
        time.sleep(self.options.pause * len(batch[0]) / self.options.batch_size)
        if self.timeline is not None:
            self.timeline.note("done")
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    @override
    def validation_step(self, batch: Batch) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.layers(batch[0]), batch[1]), sync_dist=True)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.options.sharded:
            from torch.distributed.optim import ZeroRedundancyOptimizer

            return ZeroRedundancyOptimizer(self.parameters(), torch.optim.Adam, lr=self.options.learning_rate)
        if self.options.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=self.options.learning_rate)
        return torch.optim.SGD(self.parameters(), lr=self.options.learning_rate, momentum=0.9)


class Notes(Callback):
    """Logs every step, keeps snapshots, and dies in the middle of a collective on SIGUSR1.

    Args:
        folder: Where to write.
        rank: This worker.
        every: Steps between two snapshots of the weights; 0 for none.
        timeline: Where to note that this worker is ready for its first step.

    """

    def __init__(self, folder: Path, rank: int, every: int, timeline: Timeline | None) -> None:
        self._folder = folder
        self._log = StepLog(folder, rank)
        self._every = every if rank == 0 else 0
        self._timeline = timeline
        self._is_doomed = False
        self._is_made = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        signal.signal(signal.SIGUSR1, self._doom)
        # Its gradient is the last one: those of the other layers are being reduced by then.
        first = next(pl_module.parameters())
        first.register_post_accumulate_grad_hook(self._die_if_doomed)  # type: ignore[no-untyped-call]

    @override
    def on_train_batch_start(self, *args: Any) -> None:
        if self._timeline is not None:
            self._timeline.note("ready")
            self._timeline = None

    @override
    def on_before_optimizer_step(self, *args: Any) -> None:
        self._is_made = True

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._log.add(trainer.global_step, self._is_made)
        self._is_made = False
        if self._every and trainer.global_step % self._every == 0:
            path = self._folder / f"snapshot-{trainer.global_step}-{time.monotonic()}"
            torch.save(pl_module.state_dict(), path.with_suffix(".part"))
            path.with_suffix(".part").rename(f"{path}.pt")

    def _doom(self, *args: Any) -> None:
        self._is_doomed = True

    def _die_if_doomed(self, parameter: Tensor) -> None:
        if self._is_doomed:
            self._is_doomed = False
            threading.Timer(random.uniform(0, 0.003), self._die).start()

    def _die(self) -> None:
        note = self._folder / f"killed-{os.getpid()}"
        note.with_suffix(".part").write_text(str(time.monotonic()))
        note.with_suffix(".part").rename(note)
        os.kill(os.getpid(), signal.SIGKILL)


def loaders(options: argparse.Namespace) -> tuple[DataLoader[Batch], DataLoader[Batch] | None]:
    """Return the data loaders for training, and for validation if epochs end."""
    generator = torch.Generator().manual_seed(0)
    if options.data is not None:
        images, labels = torch.load(options.data)
    else:
        images = torch.randn(1000, 784, generator=generator)
        labels = torch.randint(10, (1000,), generator=generator)
    data = TensorDataset(images, labels)
    length = (options.epoch_steps or _ENDLESS) * options.batch_size * options.ranks
    training: DataLoader[Batch] = DataLoader(Cycled(data, length), batch_size=options.batch_size, shuffle=True)
    return training, DataLoader(Cycled(data, 100), batch_size=50) if options.epoch_steps else None


def strategy(options: argparse.Namespace) -> Strategy | str:
    """Return the strategy that the command line names."""
    if options.strategy != "scar_ddp":
        return str(options.strategy)
    from lightning_scar import SCARDDPStrategy

    return SCARDDPStrategy(
        on_failure=options.on_failure, flush=options.flush, max_staleness=options.max_staleness, max_restarts=1000
    )


def digest(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    """Return a hash of the training state."""
    state: list[Any] = [module.state_dict(), [optimizer.state_dict() for optimizer in trainer.optimizers]]
    summed = hashlib.sha256()
    while state:
        item = state.pop()
        if isinstance(item, dict):
            state += [value for _, value in sorted(item.items(), key=lambda pair: str(pair[0]))]
        elif isinstance(item, (list, tuple)):
            state += item
        else:
            summed.update(item.numpy().tobytes() if isinstance(item, Tensor) else repr(item).encode())
    return summed.hexdigest()


def updates(trainer: pl.Trainer) -> int:
    """Return Adam's number of updates; -1 for an optimizer that does not count."""
    counts = {int(state.get("step", -1)) for state in trainer.optimizers[0].state.values()}
    return max(counts, default=-1)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    flags = argparse.ArgumentParser(description="a training that a benchmark kills")
    flags.add_argument("--folder", type=Path, required=True, help="where to log the steps")
    flags.add_argument("--strategy", default="scar_ddp", help="scar_ddp, ddp or auto")
    flags.add_argument("--on-failure", default="shrink")
    flags.add_argument("--flush", default="mean")
    flags.add_argument("--max-staleness", type=int, default=16)
    flags.add_argument("--ranks", type=int, default=3)
    flags.add_argument("--steps", type=int, default=_ENDLESS)
    flags.add_argument("--epoch-steps", type=int, default=0, help="validate every N steps; 0 for never")
    flags.add_argument("--pause", type=float, default=0.03, help="seconds of each step in which a worker only waits")
    flags.add_argument("--startup", type=float, default=0, help="seconds more that a start takes, but for the first")
    flags.add_argument("--timeline", action="store_true", help="note when a worker computes what")
    flags.add_argument("--batch-size", type=int, default=16)
    flags.add_argument("--width", type=int, default=512)
    flags.add_argument("--dropout", type=float, default=0.1)
    flags.add_argument("--optimizer", default="adam")
    flags.add_argument("--learning-rate", type=float, default=1e-3)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--data", type=Path, help="a file with images and labels; by default they are random")
    flags.add_argument("--snapshots", type=int, default=0, help="steps between two snapshots of the weights")
    flags.add_argument("--checkpoint-every", type=int, default=0, help="steps between two checkpoints to resume from")
    flags.add_argument("--nodes", type=int, default=1, help="the number of nodes")
    flags.add_argument("--sharded", action="store_true", help="shard the optimizer's state over the ranks")
    flags.add_argument("--memory-every", type=int, default=0, help="steps between two saves of SCARCheckpoint")
    return flags


def new_trainer(options: argparse.Namespace, callbacks: list[Callback]) -> pl.Trainer:
    """Return a Trainer without output."""
    return pl.Trainer(
        accelerator="cpu",
        devices=options.ranks // options.nodes,
        num_nodes=options.nodes,
        strategy=strategy(options),
        max_steps=options.steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=bool(options.checkpoint_every or options.memory_every),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=options.folder,
    )


def main() -> None:
    """Train."""
    options = parser().parse_args()
    rank = int(os.environ.get("RANK", "0"))
    timeline = Timeline(options.folder, rank) if options.timeline else None
    if any(options.folder.glob(f"steps-{rank}-*")):
        time.sleep(options.startup)
    pl.seed_everything(options.seed)
    callbacks: list[Callback] = [Notes(options.folder, rank, options.snapshots, timeline)]
    path = None
    if options.checkpoint_every:
        callbacks.append(
            ModelCheckpoint(options.folder / "saved", every_n_train_steps=options.checkpoint_every, save_last=True)
        )
        path = "last" if (options.folder / "saved" / "last.ckpt").exists() else None
    if options.memory_every:
        from lightning_scar import SCARCheckpoint

        every = options.memory_every
        callbacks.append(SCARCheckpoint(options.folder / "scar", every_n_train_steps=every, memory=True))
    module = Classifier(options)
    module.timeline = timeline
    trainer = new_trainer(options, callbacks)
    training, validation = loaders(options)
    trainer.fit(module, training, validation, ckpt_path=path)
    final = {"step": trainer.global_step, "hash": digest(trainer, module), "updates": updates(trainer)}
    (options.folder / f"final-{rank}.json").write_text(json.dumps(final))


if __name__ == "__main__":
    main()
