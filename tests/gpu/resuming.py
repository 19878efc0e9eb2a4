"""Trainings of many kinds that are cut short and go on in another process, where they come to the same bits."""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from gpu.part import NotShown, Setting
from lightning_scar import SCARCheckpoint

#: The batch before which the first process is cut short, in the middle of its second epoch.
_CUT, _BATCHES, _EPOCHS, _BATCH_SIZE = 6, 4, 3, 8


@dataclass(frozen=True)
class Kind:
    """A kind of training.

    Attributes:
        precision: The Trainer's.
        optimizer: Makes it.
        channels_last: Whether weights have this layout.
        compiles: Whether the model is compiled.
        needs_card: Whether it exists on accelerators only.

    """

    precision: Any = "32-true"
    optimizer: Callable[[Any], Optimizer] = Adam
    channels_last: bool = False
    compiles: bool = False
    needs_card: bool = False


KINDS = {
    "random numbers of dropout": Kind(),
    "GradScaler": Kind("16-mixed", needs_card=True),
    "bf16": Kind("bf16-true"),
    "bf16-mixed": Kind("bf16-mixed"),
    "fused Adam": Kind(optimizer=lambda parameters: Adam(parameters, fused=True)),
    "capturable Adam": Kind(optimizer=lambda parameters: Adam(parameters, capturable=True), needs_card=True),
    "channels-last": Kind(channels_last=True),
    "torch.compile": Kind(compiles=True),
}


class Model(pl.LightningModule):
    """A convolution, running statistics, dropout.

    Args:
        kind: How it is trained.
        backend: The compiler's.

    """

    def __init__(self, kind: Kind, backend: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 1)]
        self.net = nn.Sequential(*layers)
        self.kind = kind
        if kind.channels_last:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if kind.compiles:
            self.net.compile(backend=backend)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x).float(), y.float())

    def configure_optimizers(self) -> Optimizer:
        return self.kind.optimizer(self.parameters())


class Seeded(Callback):
    """Lets each process begin with random numbers of its own."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_fit_start(self, *args: Any) -> None:
        torch.manual_seed(self._seed)


class Cut(Exception):
    """The end of a training that is cut short."""


class CutBefore(Callback):
    """Cuts a training short before a batch."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.completed >= _CUT:
            raise Cut


def data() -> "DataLoader[Any]":
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_BATCHES * _BATCH_SIZE, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, x.sum((1, 2, 3)).unsqueeze(1)), batch_size=_BATCH_SIZE, shuffle=True)


class Final(Callback):
    """Keeps the state at the end, and where each tensor of it is, of which type and in which layout."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        live = {"weights": pl_module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()["state"]}
        self.state = {name: tensor.detach().cpu().clone() for name, tensor in _tensors(live)}
        self.state["/places"] = [(name, t.device.type, str(t.dtype), t.stride()) for name, t in _tensors(live)]
        self.state["/scaler"] = trainer.precision_plugin.state_dict()
        self.state["/steps"] = trainer.global_step


def _tensors(state: Any, name: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        return [(name, state)]
    return [pair for key, each in state.items() for pair in _tensors(each, f"{name}/{key}")]


def fit(device: str, kind: Kind, folder: Path, seed: int, *callbacks: Callback) -> dict[str, Any]:
    """Train, from where a folder has come to if it has, and return the state at the end."""
    # Inductor needs a compiler of the host, too, and on two cores minutes.
    model = Model(kind, "inductor" if device == "cuda" else "eager")
    scar = SCARCheckpoint(folder, every_n_train_steps=1, fraction=1.0, full_every_n_saves=1, save_on_exception=False)
    final = Final()
    trainer = pl.Trainer(
        accelerator=device,
        devices=1,
        max_epochs=_EPOCHS,
        precision=kind.precision,
        callbacks=[scar, Seeded(seed), final, *callbacks],
        deterministic=True,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data())
    return final.state


# -- the part, and its second process ------------------------------------------------------------------------------


def resumed(setting: Setting) -> dict[str, Any]:
    """Each kind; what is cut short goes on in a process that begins with other random numbers."""
    kinds = [name for name, kind in KINDS.items() if setting.is_on_card or not kind.needs_card]
    told = dict.fromkeys(KINDS, "only on a card")
    whole: dict[str, dict[str, Any]] = {}
    for name in kinds:
        state = _whole_and_cut(setting, name)
        if isinstance(state, str):
            told[name] = state
        else:
            whole[name] = state
    command = [sys.executable, "-m", "gpu.resuming", setting.device, str(setting.folder), *whole]
    path = os.pathsep.join(path for path in sys.path if path)
    subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path}, stdout=sys.stderr)
    for name, state in whole.items():
        told[name] = _compared(state, _of(setting.folder, name))
    figures = {"kinds": told, "same": list(told.values()).count("same")}
    if bad := {name: text for name, text in told.items() if text not in ("same", "only on a card")}:
        raise NotShown("; ".join(f"{name}: {text}" for name, text in bad.items()), figures)
    return figures


def _whole_and_cut(setting: Setting, name: str) -> dict[str, Any] | str:
    """Train twice, the second time not to the end; return the state at the end, or what went wrong."""
    kind, folder = KINDS[name], _of(setting.folder, name)
    try:
        whole = fit(setting.device, kind, folder / "whole", 1)
        fit(setting.device, kind, folder / "cut", 1, CutBefore())
    except Cut:
        return whole
    except Exception as error:
        return _noted(error)
    return "the training was not cut short"


def _compared(whole: dict[str, Any], folder: Path) -> str:
    if not (folder / "resumed.pt").exists():
        error = folder / "error.txt"
        return error.read_text() if error.exists() else "the second process ended too early"
    found = torch.load(folder / "resumed.pt", "cpu", weights_only=False)
    for name, value in whole.items():
        is_same = torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value
        if not is_same:
            return f"{name} is not the same"
    return "same"


def _of(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "-")


def _noted(error: Exception) -> str:
    traceback.print_exc()
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def main(device: str, folder: Path, names: list[str]) -> None:
    """Go on with what is there, in the second process."""
    for name in names:
        _go_on(device, name, _of(folder, name))


def _go_on(device: str, name: str, folder: Path) -> None:
    try:
        torch.save(fit(device, KINDS[name], folder / "cut", seed=2), folder / "resumed.pt")
    except Exception as error:
        (folder / "error.txt").write_text(_noted(error))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
