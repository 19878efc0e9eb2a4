"""Trainings for processes that are killed. Every function here is the main function of a process."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from helpers import BATCH_SIZE, StopAfter, TinyModel, WrittenTogether, make_trainer, samples, saver
from torch import Tensor, nn
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_scar.storage.host_memory import VARIABLE

SLOTS = ("param", "exp_avg", "exp_avg_sq")


def stateful() -> Any:
    return StatefulDataLoader(samples(), batch_size=BATCH_SIZE)


class Diary(pl.LightningModule):
    """Writes down, after every step, what is live; what it wrote outlives a SIGKILL."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(8, 64)
        self.path = path

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        time.sleep(0.003)
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def on_train_batch_end(self, *args: Any) -> None:
        state = self.trainer.optimizers[0].state
        tensors = [
            tensor.detach().clone()
            for parameter in self.parameters()
            for tensor in (parameter, state[parameter]["exp_avg"], state[parameter]["exp_avg_sq"])
        ]
        record = torch.cat([torch.tensor([float(self.global_step)]), *(tensor.flatten() for tensor in tensors)])
        with open(self.path, "ab", buffering=0) as file:
            file.write(record.numpy().tobytes())


DIARY_FLOATS = 1 + 3 * (64 * 8 + 64)


def read_diary(path: Path) -> dict[int, dict[str, Tensor]]:
    """For every step the live tensors, by name and slot."""
    floats = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32) if path.exists() else torch.zeros(0)
    days = {}
    for i in range(len(floats) // DIARY_FLOATS):
        step, weights, biases = floats[i * DIARY_FLOATS : (i + 1) * DIARY_FLOATS].split([1, 3 * 512, 3 * 64])
        weight = dict(zip((f"net.weight/{slot}" for slot in SLOTS), weights.view(3, 64, 8), strict=True))
        bias = dict(zip((f"net.bias/{slot}" for slot in SLOTS), biases.view(3, 64), strict=True))
        days[int(step)] = weight | bias
    return days


def with_memory(host: Path | None) -> dict[str, Any]:
    """The options of a training on a host with this memory."""
    if host is None:
        return {}
    os.environ[VARIABLE] = str(host)
    return {"memory": True}


def write_diary(dirpath: Path, path: Path, max_steps: int = 100_000, host: Path | None = None, **options: Any) -> None:
    """A training that saves at every second step."""
    options |= with_memory(host)
    scar = saver(dirpath, every_n_train_steps=2, **{"fraction": 0.3, "block_size": 64, **options})
    make_trainer(scar, max_steps=max_steps, max_epochs=-1).fit(Diary(path), stateful())


def hang_in_the_first_save(dirpath: Path, marker: Path) -> None:
    """A fresh training over an older one that gets as far as its first file, whole but for its name."""

    def fsync(descriptor: int) -> None:
        if ".safetensors" in os.readlink(f"/proc/self/fd/{descriptor}"):
            marker.touch()
            time.sleep(60)

    os.fsync = fsync  # type: ignore[assignment]
    make_trainer(saver(dirpath, resume=False), max_epochs=2).fit(TinyModel(), stateful())


class Counted(TinyModel):
    """Adds a byte to a file for every batch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        with open(self.path, "ab", buffering=0) as file:
            file.write(b".")
        time.sleep(0.02)
        return loss


def train_counted(dirpath: Path, path: Path, seen: Path, **options: Any) -> None:
    """A training that saves only when it is told to stop."""
    # What a shell runs in the background ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model = Counted(path)
    scar = saver(dirpath, every_n_train_steps=1000, save_on_exception=True)
    try:
        make_trainer(scar, max_epochs=4, **options).fit(model, stateful())
    finally:
        torch.save(model.seen, seen)


class TerminatedIn(TinyModel):
    """Gets a SIGTERM in a hook of the last epoch, behind its last batch."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook = hook

    def _terminate(self, hook: str) -> None:
        if hook == self.hook and self.global_step == 16:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_epoch_end(self) -> None:
        self._terminate("validation")

    def on_train_epoch_end(self) -> None:
        self._terminate("epoch end")


def train_terminated(dirpath: Path, end: Path, hook: str) -> None:
    make_trainer(saver(dirpath), max_epochs=2).fit(TerminatedIn(hook), stateful(), stateful())
    end.touch()


class Rank(TinyModel):
    """Leaves behind what every rank had at the start and the end."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def _leave(self, when: str) -> None:
        self.folder.mkdir(exist_ok=True)
        state = {
            "step": self.global_step,
            "state_dict": self.state_dict(),
            "optimizer": self.trainer.optimizers[0].state_dict(),
        }
        torch.save(state, self.folder / f"{when}-{self.global_rank}.pt")

    def on_train_start(self) -> None:
        self._leave("start")

    def on_train_batch_end(self, *args: Any) -> None:
        self._leave("last")


def train_ranks(dirpath: Path, folder: Path, after: int | None = None) -> None:
    """Two ranks over gloo, of which both fail after some batches."""
    callbacks = [StopAfter(after)] if after else []
    scar = saver(dirpath, full_every_n_saves=1)
    loop = make_trainer(scar, WrittenTogether(scar), *callbacks, strategy="ddp_fork", devices=2, max_epochs=2)
    loop.fit(Rank(folder), stateful())
