"""The script that ``scar_ddp_runs`` starts, with what that asks for as JSON. A worker hurts itself at its time."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torchmetrics
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from scar_cards import accelerator
from scar_job import (
    BACKEND,
    BATCH_SIZE,
    OPTIMIZERS,
    RATE,
    SAMPLES,
    Averaging,
    Used,
    asked,
    begin,
    folder,
    generators,
    graphs,
    note_saves,
    number_of_generation,
    options_of_scar,
    place,
    samples,
    seed_of_slot,
    slot,
    take,
    write_down,
)
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_scar import SCARCheckpoint, SCARDDPStrategy


class Stream(IterableDataset[Any]):
    """Every rank has its share of the samples; a replacement has that of the slot.

    Args:
        batches: How many batches each rank has at most.

    """

    def __init__(self, batches: list[int] | None = None) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        mine = range(slot, SAMPLES, world_size)
        for i in mine if self.batches is None else mine[: self.batches[slot] * BATCH_SIZE]:
            yield samples()[i]


class Model(pl.LightningModule):
    """Notes which samples it makes its steps of.

    Args:
        rich: Whether it has buffers and a schedule, too.
        dropout: Whether it draws random numbers.
        manual: Whether it optimizes manually.
        plateau: Whether it lowers its rate when a validation is not better.
        sharded: Whether each rank has a part of the optimizer's state.
        averaging: Whether the optimizer communicates.
        optimizer: One of ``OPTIMIZERS``.
        double: Whether it computes in double precision.
        gathers: Whether its loss depends on that of other ranks.
        compiled: Whether ``torch.compile`` gets its net: ``net``.
        habits: What its steps do besides: ``changes the batch``, ``freezes a layer``, ``follows the loss``, ``collects
            metrics``, ``counts batches``, ``moves weights``.

    """

    def __init__(
        self,
        rich: bool = False,
        dropout: bool = False,
        manual: bool = False,
        sharded: bool = False,
        averaging: bool = False,
        plateau: bool = False,
        optimizer: str = "Adam",
        double: bool = False,
        gathers: bool = False,
        compiled: str = "",
        habits: Sequence[str] = (),
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        between = [*([nn.BatchNorm1d(16)] if rich else []), *([nn.Dropout(0.2)] if dropout else [])]
        self.net = nn.Sequential(nn.Linear(8, 16), *between, nn.ReLU(), nn.Linear(16, 1))
        self.rich = rich
        self.optimizer = optimizer
        self.gathers = gathers
        self.habits = habits
        self.errors = torchmetrics.MetricCollection([torchmetrics.MeanSquaredError(), torchmetrics.R2Score()])
        if "moves weights" in habits:
            self.momentum = nn.Linear(8, 16).requires_grad_(False)
        if double:
            self.double()
        if compiled == "net":
            self.net = torch.compile(self.net, backend="eager")
        self.plateau = plateau
        self.sharded = sharded
        self.averaging = averaging
        self.automatic_optimization = not manual
        self.samples = torchmetrics.SumMetric()
        self.val_error = torchmetrics.MeanSquaredError()
        self.used = Used(self.attempt)
        self.random = 0
        seed_of_slot()

    def setup(self, stage: str) -> None:
        place("setup", asked["predecessors"])

    def attempt(self) -> dict[str, int]:
        """The number of the step, and of the generation that makes it."""
        member = getattr(self.trainer.strategy, "_member", None)
        return {"step": self.global_step + 1, "generation": number_of_generation(member)}

    @property
    def batches_done(self) -> int:
        return self.trainer.fit_loop.epoch_loop.total_batch_idx

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.used.begin(batch[2].tolist(), is_first=batch_idx % self.trainer.accumulate_grad_batches == 0)
        if "freezes a layer" in self.habits:
            self.net[0].requires_grad_(not 3 <= self.batches_done < 11)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        strategy = self.trainer.strategy
        is_joiner = isinstance(strategy, SCARDDPStrategy) and strategy.is_joiner
        place(*(("join", asked["predecessors"]) if is_joiner else ("training_step", self.batches_done)))
        self.random = generators()
        x, y, ids = take(batch) if "changes the batch" in self.habits else batch
        self.used.note(ids.tolist())
        out = self.net(x)
        if out.requires_grad:
            out.register_hook(lambda gradient: None if is_joiner else place("backward", self.batches_done))
        loss = nn.functional.mse_loss(out, y)
        if "moves weights" in self.habits:
            weight = self.momentum.weight
            weight.data = 0.8 * weight.data + 0.2 * self.net[0].weight.data
            loss = loss + nn.functional.mse_loss(self.net[0](x), self.momentum(x))
        if self.gathers:
            loss = loss + self.all_gather(loss.detach()).mean()
        if "counts batches" in self.habits:
            loss = loss * (1 + batch_idx % 3)
        if "collects metrics" in self.habits:
            self.errors(out.detach(), y)
            self.log_dict(self.errors, on_step=False, on_epoch=True)
            self.log("followed", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("loss", loss, sync_dist=True)
        self.log("batches", 1.0, on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)
        self.samples.update(float(len(ids)))
        self.log("samples", self.samples, on_step=False, on_epoch=True)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        random = [self.random, generators()]
        more = {"used": self.used.list(), "world_size": world_size, "random": random, "graphs": graphs()}
        write_down("steps", **self.attempt(), **more)
        place("before_step", self.batches_done)

    def on_train_batch_end(self, *args: Any) -> None:
        place("batch_end", self.batches_done)
        if "follows the loss" in self.habits:
            for group in self.optimizers().param_groups:
                group["lr"] = RATE / (1 + float(self.trainer.callback_metrics["loss"]))

    def on_train_epoch_end(self) -> None:
        place("epoch_end", self.current_epoch)

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        place("save", self.current_epoch if asked.get("callbacks") else self.global_step)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        phase = "sanity check" if self.trainer.sanity_checking else "validation"
        if (folder() / f"kept-{slot}.jsonl").exists():
            place(f"third fit's {phase}", self.current_epoch)
        place(phase, self.current_epoch)
        x, y, _ = batch
        out = self.net(x)
        self.val_error(out, y)
        self.log("val_loss", nn.functional.mse_loss(out, y), sync_dist=True)
        self.log("val_error", self.val_error)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        place("test", 0)
        self.log("test_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        if self.sharded:
            return ZeroRedundancyOptimizer(self.parameters(), torch.optim.Adam, lr=RATE)
        optimizer = (Averaging if self.averaging else OPTIMIZERS[self.optimizer])(self.parameters(), RATE)
        if self.plateau:
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}
        if not self.rich:
            return optimizer
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.5), "interval": "step"}]


class Data(pl.LightningDataModule):
    """
    Args:
        iterable: Whether the data have no length.
        batches: How many each rank then has.
        own: Whether each rank has an order of its own, by a generator of its own.
        process: How a process is started that loads them, and collates them with a method that knows the Trainer;
            by default none is.

    """

    def __init__(
        self, iterable: bool = False, batches: list[int] | None = None, process: str | None = None, own: bool = False
    ) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(slot) if own else None
        self.iterable = iterable
        self.batches = batches
        self.options: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": process} if process else {}

    def collate(self, items: list[Any]) -> Any:
        return default_collate(items)

    def train_dataloader(self) -> Any:
        data = Stream(self.batches) if self.iterable else samples()
        shuffle = None if self.iterable else True
        options = {"shuffle": shuffle, "generator": self.generator, "collate_fn": self.collate, **self.options}
        return DataLoader(data, batch_size=BATCH_SIZE, **options)

    def val_dataloader(self) -> Any:
        return DataLoader(samples(), batch_size=24)

    test_dataloader = val_dataloader


class Validations(Callback):
    """Keeps in the checkpoint at which steps validations and epochs ended, and with which metrics."""

    def __init__(self) -> None:
        self.ended: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        return {"ended": list(self.ended)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ended = list(state["ended"])

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.ended.append([trainer.global_step, float(trainer.callback_metrics["val_loss"])])

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.ended.append([trainer.current_epoch, trainer.global_step])


CALLBACKS: dict[str, Callable[[], Callback]] = {
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(RATE, swa_epoch_start=1),
    "Validations": Validations,
    "EarlyStopping at its defaults": lambda: EarlyStopping("val_loss"),
    "ModelCheckpoint": lambda: ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True),
    "EarlyStopping": lambda: EarlyStopping("val_loss", patience=1, min_delta=1e9),
    "LearningRateMonitor": lambda: LearningRateMonitor("step"),
}


# -- the script ----------------------------------------------------------------------------------------------------


def make_trainer() -> pl.Trainer:
    strategy = asked["strategy"]
    callbacks = [CALLBACKS[name]() for name in asked.get("callbacks", [])]
    if "scar" in asked:
        callbacks.append(SCARCheckpoint(folder() / "scar", **options_of_scar()))
        note_saves(callbacks[-1]._schedule)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    options = {"accelerator": accelerator(), "devices": asked["ranks"], "default_root_dir": folder(), **quiet}
    options |= {"enable_checkpointing": bool(callbacks), "max_epochs": 2, **asked["trainer"]}
    options |= {"logger": CSVLogger(folder(), name="logs") if asked.get("logs") else False, "callbacks": callbacks}
    if BACKEND != "gloo" and strategy == "scar_ddp":
        strategy = {}
    if isinstance(strategy, dict):
        strategy = SCARDDPStrategy(**{"process_group_backend": BACKEND, **strategy})
    return pl.Trainer(strategy=strategy, **options)


def write_result(trainer: pl.Trainer, module: pl.LightningModule, **more: Any) -> None:
    result = {
        "rank": trainer.global_rank,
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "state": {
            "state_dict": module.state_dict(),
            # Of a sharded one this rank's part.
            "optimizer_states": [
                getattr(optimizer, "optim", optimizer).state_dict() for optimizer in trainer.optimizers
            ],
            "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        },
        "outages": [vars(outage) for outage in getattr(trainer.strategy, "outages", [])],
        "metrics": dict(trainer.callback_metrics),
        "callbacks": {
            type(callback).__name__: callback.state_dict()
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, Validations | EarlyStopping | ModelCheckpoint)
        },
        "is_global_zero": trainer.is_global_zero,
        **more,
    }
    torch.save(result, folder() / f"result-{slot}.pt")


def main() -> None:
    begin()
    if "cli" in asked:
        cli = LightningCLI(Model, Data, args=asked["cli"], run=False)
        cli.trainer.fit(cli.model, cli.datamodule)
        return write_result(cli.trainer, cli.model)
    for _ in range(asked.get("fits_before", 0)):
        make_trainer().fit(Model(**asked["model"]), Data(**asked["data"]))
    kept = Path(os.environ.get("LIGHTNING_SCAR_STATE", folder()))
    write_down("kept", in_memory=[path.name for path in kept.glob("call-*")])
    trainer, module, data = make_trainer(), Model(**asked["model"]), Data(**asked["data"])
    trainer.fit(module, data)
    place("end", 0)
    write_result(trainer, module)
    if asked.get("test"):
        fitted = module.state_dict()
        tested = trainer.test(module, data)
        result = torch.load(folder() / f"result-{slot}.pt", weights_only=False)
        torch.save({**result, "tested": tested, "fitted": fitted}, folder() / f"result-{slot}.pt")
    return None


if __name__ == "__main__":
    main()
