"""One training through each front door, with our checkpoints and with the framework's own, for ``resume_table``.

A process of it writes down what it does, and hurts itself where it is told to. ``python -m benchmarks.resume_training
JSON`` runs it as a program, which ``scar_ddp`` needs.
"""

import contextlib
import io
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR, StepLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from typing_extensions import override

from lightning_scar import SCARAccelerator, SCARCheckpoint, SCARDDPStrategy, SCARLoop

BATCHES, BATCH = 8, 4
#: Seconds in which a save is written, before a process dies.
_WRITES = 0.3


@dataclass(frozen=True)
class Asked:
    """What a process is to do.

    Attributes:
        folder: Where it writes.
        door: ``"Trainer"``, ``"ddp"``, ``"scar_ddp"``, ``"Accelerate"`` or ``"Fabric"``.
        side: ``"scar"`` or ``"peer"``.
        ranks: The number of processes.
        dies: Where, at which batch or epoch, and by which signal; each once, in the run's life.
        epochs: How many.
        every: Steps between two saves.
        validates_every: Steps between two validations; ``None`` for one behind each epoch.
        shuffles: Whether the framework shuffles the data, and divides them among the ranks.
        dropout: Whether the model draws random numbers.
        noise: Whether the dataset does.
        workers: The number of the loader's workers.
        averages: Whether the Trainer logs an average over each epoch.
        counts: Whether the module changes its buffers behind each batch.
        renames: Whether the model has names of its own, and knows those of before.
        width: The model's size.

    """

    folder: str
    door: str
    side: str = "scar"
    ranks: int = 1
    dies: tuple[tuple[str, int, str], ...] = ()
    epochs: int = 3
    every: int = 1
    validates_every: int | None = None
    shuffles: bool = False
    dropout: bool = False
    noise: bool = False
    workers: int = 0
    averages: bool = False
    counts: bool = False
    renames: bool = False
    width: int = 16

    def json(self) -> str:
        """Return the argument of the program."""
        return json.dumps(asdict(self))


class Notes:
    """What a process leaves behind.

    Args:
        asked: What it is to do.

    """

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._folder = Path(asked.folder)
        self.rank = int(os.environ.get("RANK", "0"))
        self.starts = len(list(self._folder.glob(f"start-{self.rank}-*")))
        (self._folder / f"start-{self.rank}-{self.starts}").touch()

    def place(self, where: str, number: int) -> None:
        """Die here, if it is time."""
        for i, (name, at, how) in enumerate(self._asked.dies):
            mark = self._folder / f"died-{i}-{self.rank}"
            if (name, at) != (where, number) or mark.exists():
                continue
            time.sleep(_WRITES)
            if self._asked.door == "scar_ddp":
                self._die_under_the_supervisor(mark, signal.Signals[how])
                continue
            mark.touch()
            # All of them, as when a host is lost.
            while len(list(self._folder.glob(f"died-{i}-*"))) < self._asked.ranks:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.Signals[how])

    def _die_under_the_supervisor(self, mark: Path, how: signal.Signals) -> None:
        if how == signal.SIGKILL and self.rank == 1:
            mark.touch()
            os.kill(os.getpid(), how)
        elif how != signal.SIGKILL and self.rank == 0:
            mark.touch()
            os.kill(os.getppid(), how)

    def batch(self, at: int, ids: Tensor, drawn: float) -> None:
        """Note a batch that is trained on."""
        self._write("batches", at, ids.tolist(), drawn)

    def validation(self, step: int, value: float) -> None:
        """Note a validation that came to its end."""
        self._write("validations", step, round(value, 5))

    def average(self, epoch: int, value: float) -> None:
        """Note an average over an epoch."""
        self._write("averages", epoch, round(value, 5))

    def _write(self, name: str, *values: Any) -> None:
        with (self._folder / f"{name}-{self.rank}.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def end(self, **state: Any) -> None:
        """Note what is there when the program comes to its end."""
        torch.save(state, self._folder / f"end-{self.rank}.pt")


class Samples(Dataset[Any]):
    """Samples, and their indices."""

    def __init__(self, of: range, noise: bool = False) -> None:
        self._of, self._noise = of, noise

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        x = torch.linspace(0, 1, 8) * (self._of[i] % 7)
        return (x + torch.rand(8) if self._noise else x), self._of[i]


def training_data(asked: Asked, rank: int) -> Any:
    """Return the loader. What is not shuffled has a state, and each rank its share, so that peers can place it."""
    count = BATCHES * BATCH * 2
    if asked.shuffles:
        return DataLoader(Samples(range(count)), BATCH, shuffle=True)
    if asked.door == "scar_ddp":
        # The survivors know what the dead worker's batches would have been.
        whole = Samples(range(count // 2 * asked.ranks), asked.noise)
        sampler: DistributedSampler[Any] = DistributedSampler(whole, asked.ranks, rank, shuffle=False)
        return StatefulDataLoader(whole, BATCH, sampler=sampler, num_workers=asked.workers)
    data = Samples(range(rank, count // 2 * asked.ranks, asked.ranks), asked.noise)
    return StatefulDataLoader(data, BATCH, num_workers=asked.workers)


class Net(nn.Module):
    """A small model."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Sequential(
            nn.Linear(8, asked.width), nn.Dropout(0.3 if asked.dropout else 0.0), nn.Linear(asked.width, 1)
        )
        if asked.renames:
            self._orig_mod = layers
            self.register_load_state_dict_pre_hook(_rename)  # type: ignore[no-untyped-call]
        else:
            self.layers = layers
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, batch: Any) -> Tensor:
        layers = getattr(self, "_orig_mod", None) or self.layers
        return layers(batch[0]).square().mean()  # type: ignore[no-any-return]

    def change(self) -> None:
        """Change the buffers, one of which has no dimension."""
        for buffer in self.buffers():
            buffer += 1


def _rename(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}layers.")]:
        state[name.replace(f"{prefix}layers.", f"{prefix}_orig_mod.")] = state.pop(name)


def _schedules(optimizer: Any) -> list[Any]:
    return [LinearLR(optimizer, 1.0, 0.5, 40), StepLR(optimizer, 1, 0.9)]


# -- a Trainer -------------------------------------------------------------------------------------------------------


class Module(pl.LightningModule):
    """The model of a Trainer."""

    def __init__(self, asked: Asked, notes: Notes) -> None:
        super().__init__()
        self.net = Net(asked)
        self.asked, self.notes = asked, notes

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        at = self.trainer.fit_loop.epoch_loop.total_batch_idx
        # A replacement's own batch does not count.
        if not getattr(self.trainer.strategy, "is_joiner", False):
            self.notes.place("batch", at)
            self.notes.batch(at, batch[1], _drawn(self.asked, batch))
        loss: Tensor = self.net(batch)
        if self.asked.averages:
            self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        if self.asked.counts:
            self.net.change()

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.notes.place("validation", self.global_step)
        self.log("v", self.net(batch), sync_dist=True)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        each_step, each_epoch = _schedules(optimizer)
        return [optimizer], [{"scheduler": each_step, "interval": "step"}, each_epoch]


class _Watch(Callback):
    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    @override
    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._notes.validation(trainer.global_step, float(trainer.callback_metrics["v"]))

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if "loss" in trainer.callback_metrics:
            self._notes.average(trainer.current_epoch, float(trainer.callback_metrics["loss"]))
        self._notes.place("epoch end", trainer.current_epoch)


def _train_with_a_trainer(asked: Asked, notes: Notes) -> None:
    folder = Path(asked.folder)
    stops = EarlyStopping("v", patience=100)
    best = ModelCheckpoint(folder / "best", monitor="v")
    if asked.door == "scar_ddp":
        # While a worker is missing, the gradients are added in another order.
        torch.set_default_dtype(torch.float64)
    peer = ModelCheckpoint(folder / "peer", every_n_train_steps=asked.every, save_last=True)
    mine = SCARCheckpoint(folder / "scar", every_n_train_steps=asked.every, **_OPTIONS)
    last = folder / "peer" / "last.ckpt"
    strategy: Any = "ddp" if asked.ranks > 1 else "auto"
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=asked.ranks,
        strategy=SCARDDPStrategy() if asked.door == "scar_ddp" else strategy,
        callbacks=[stops, best, mine if asked.side == "scar" else peer, _Watch(notes)],
        max_epochs=asked.epochs,
        use_distributed_sampler=asked.shuffles,
        num_sanity_val_steps=0,
        val_check_interval=asked.validates_every,
        check_val_every_n_epoch=None if asked.validates_every else 1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    notes.rank = trainer.global_rank
    module = Module(asked, notes)
    torch.manual_seed(1000 * notes.starts + notes.rank)
    data = training_data(asked, notes.rank)
    trainer.fit(module, data, _validation_data(), ckpt_path=last if asked.side == "peer" and last.exists() else None)
    kept = best.state_dict()
    notes.end(
        weights=module.net.state_dict(),
        optimizer=[optimizer.state_dict()["state"] for optimizer in trainer.optimizers],
        schedules=[config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        steps=trainer.global_step,
        epochs=trainer.current_epoch,
        callbacks=[stops.state_dict(), kept["best_model_score"], len(kept["best_k_models"])],
    )


# -- loops -----------------------------------------------------------------------------------------------------------


class Best:
    """What loops keep of their validations."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the values."""
        return {"values": list(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load them."""
        self.values = list(state["values"])


class Loop:
    """A loop with Accelerate or Fabric, and the framework's own checkpoints."""

    def __init__(self, asked: Asked, notes: Notes) -> None:
        self.asked, self.notes = asked, notes
        self.best, self.done = Best(), 0
        self.net = Net(asked)
        optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01)
        if asked.door == "Accelerate":
            config = DataLoaderConfiguration(use_seedable_sampler=asked.shuffles)
            self.accelerator = Accelerator(cpu=True, dataloader_config=config)
            prepared = self.accelerator.prepare(self.net, optimizer, training_data(asked, notes.rank))
            self.model, self.optimizer, self.loader = prepared
            self.schedules = [self.accelerator.prepare(schedule) for schedule in _schedules(optimizer)]
            self.accelerator.register_for_checkpointing(self.best)
        else:
            self.fabric = Fabric(accelerator="cpu", devices=asked.ranks, strategy="ddp" if asked.ranks > 1 else "auto")
            self.fabric.launch()
            self.model, self.optimizer = self.fabric.setup(self.net, optimizer)
            self.loader = self.fabric.setup_dataloaders(
                training_data(asked, notes.rank), use_distributed_sampler=asked.shuffles
            )
            self.schedules = _schedules(optimizer)
        self.state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "each step": self.schedules[0],
            "each epoch": self.schedules[1],
            "best": self.best,
        }
        torch.manual_seed(1000 * notes.starts + notes.rank)

    def run(self) -> None:
        """Train to the end."""
        for epoch in range(self.resume(), self.asked.epochs):
            for batch in self.batches():
                self.notes.place("batch", self.done)
                self.notes.batch(self.done, batch[1], _drawn(self.asked, batch))
                self.backward(self.model(batch))
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.schedules[0].step()
                if self.asked.counts:
                    self.net.change()
                if self.asked.validates_every and (self.done + 1) % self.asked.validates_every == 0:
                    self.validate(self.done + 1)
                self.step()
            if not self.asked.validates_every:
                self.validate(self.done)
            self.notes.place("epoch end", epoch)
            self.schedules[1].step()

    def validate(self, step: int) -> None:
        """Measure, and keep the value."""
        self.net.eval()
        with torch.no_grad():
            for batch in _validation_data():
                self.notes.place("validation", step)
                value = float(self.net(batch))
        self.net.train()
        self.best.values.append(round(value, 5))
        self.notes.validation(step, value)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients."""
        if self.asked.door == "Accelerate":
            self.accelerator.backward(loss)
        else:
            self.fabric.backward(loss)

    def end(self) -> None:
        """Write down what is there."""
        self.notes.end(
            weights=self.net.state_dict(),
            optimizer=[self.optimizer.state_dict()["state"]],
            schedules=[schedule.state_dict() for schedule in self.schedules],
            steps=self.done,
            callbacks=self.best.values,
        )

    # -- its checkpoints

    def resume(self) -> int:
        """Load what there is, and return the epoch to begin with."""
        folder, count = Path(self.asked.folder) / "peer", Path(self.asked.folder) / "done"
        if count.exists():
            self.done = int(count.read_text())
            if self.asked.door == "Accelerate":
                self.accelerator.load_state(str(folder))
            else:
                self.fabric.load(folder, dict(self.state))
        return self.done // len(self.loader)

    def batches(self) -> Any:
        """Return the batches of an epoch that are not done."""
        skipped = self.done % len(self.loader)
        if self.asked.door == "Accelerate":
            return self.accelerator.skip_first_batches(self.loader, skipped) if skipped else self.loader
        return (batch for i, batch in enumerate(self.loader) if i >= skipped)

    def step(self) -> None:
        """Count a batch, and save."""
        self.done += 1
        if self.done % self.asked.every:
            return
        if self.asked.door == "Accelerate":
            self.accelerator.save_state(f"{self.asked.folder}/peer")
        else:
            self.fabric.save(f"{self.asked.folder}/peer", self.state)
        Path(self.asked.folder, "done").write_text(str(self.done))


class OurLoop(Loop):
    """The same with our checkpoints."""

    def __init__(self, asked: Asked, notes: Notes) -> None:
        super().__init__(asked, notes)
        options = {"every_n_steps": asked.every, **_OPTIONS}
        folder = Path(asked.folder) / "scar"
        self.scar = (
            SCARAccelerator(self.accelerator, folder, **options)
            if asked.door == "Accelerate"
            else SCARLoop(folder, self.state, **options)
        )

    @override
    def run(self) -> None:
        with self.scar:
            super().run()

    @override
    def resume(self) -> int:
        self.done = self.scar.resume()
        return self.scar.epoch

    @override
    def batches(self) -> Iterator[Any]:
        for batch in self.scar.batches(self.loader):
            self.done = self.scar.batches_done
            yield batch
        self.done = self.scar.batches_done

    @override
    def step(self) -> None:
        self.scar.step()
        self.done = self.scar.batches_done


# -- a process -------------------------------------------------------------------------------------------------------

#: Full saves, because others are skipped while the disk is slow.
_OPTIONS: dict[str, Any] = {"fraction": 1.0, "full_every_n_saves": 1}


def _drawn(asked: Asked, batch: Any) -> float:
    return float(batch[0].sum()) + (float(torch.rand(())) if asked.dropout else 0.0)


def _validation_data() -> Any:
    return DataLoader(Samples(range(8)), BATCH)


def train(rank: int, asked: Asked) -> None:
    """Be one process of a training."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        notes = Notes(asked)
        if asked.door in ("Accelerate", "Fabric"):
            loop = (OurLoop if asked.side == "scar" else Loop)(asked, notes)
            loop.run()
            loop.end()
        else:
            _train_with_a_trainer(asked, notes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(0, Asked(**{**json.loads(sys.argv[1]), "dies": tuple(map(tuple, json.loads(sys.argv[1])["dies"]))}))
