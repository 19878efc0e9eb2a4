"""What ``scar_ddp_training`` trains with a Trainer, as a loop of Accelerate or Fabric."""

import itertools
import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from scar_cards import DEVICE, take_a_card
from scar_job import (
    BACKEND,
    BATCH_SIZE,
    OPTIMIZERS,
    RATE,
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
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from lightning_scar import SCARAccelerator, SCARContinuation, SCARLoop


class Net(nn.Module):
    """As the Trainer's model."""

    def __init__(
        self, rich: bool = False, dropout: bool = False, double: bool = False, compiled: str = "", **others: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        between = [*([nn.BatchNorm1d(16)] if rich else []), *([nn.Dropout(0.2)] if dropout else [])]
        self.net = nn.Sequential(nn.Linear(8, 16), *between, nn.ReLU(), nn.Linear(16, 1))
        if double:
            self.double()
        if compiled == "net":
            self.net = torch.compile(self.net, backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def options_for_a_loop() -> dict[str, Any]:
    options = {"every_n_steps": 1000, "fraction": 1.0, **options_of_scar()}
    if "every_n_train_steps" in options:
        options["every_n_steps"] = options.pop("every_n_train_steps")
    if {"train_time_interval", "max_overhead"} & options.keys():
        del options["every_n_steps"]
    return options


class Short:
    """A loader with fewer batches."""

    def __init__(self, loader: Any, batches: int) -> None:
        self.loader, self.batches = loader, batches

    def __iter__(self) -> Any:
        return itertools.islice(self.loader, self.batches)


class Loop:
    """In Accelerate's words."""

    def __init__(self) -> None:
        strategy, trainer = asked["strategy"], asked["trainer"]
        self.continuation = None
        if strategy != "ddp":
            options = strategy if isinstance(strategy, dict) else {}
            self.continuation = SCARContinuation(**{"backend": BACKEND, **options})
        place("setup", asked["predecessors"])
        self.epochs = trainer.get("max_epochs", 2)
        self.clip = trainer.get("gradient_clip_val")
        self.validates = trainer.get("limit_val_batches", 1) > 0
        self.micro_batches = trainer.get("accumulate_grad_batches", 1)
        batches = asked["data"].get("batches")
        #: Of an epoch; all if ``None``.
        self.batches = batches[slot] if batches else None
        self.scaler: Any = None
        self.used = Used(self.attempt)
        self.random = 0
        model = Net(**asked["model"])
        kind = Averaging if asked["model"].get("averaging") else OPTIMIZERS[asked["model"].get("optimizer", "Adam")]
        optimizer = kind(model.parameters(), RATE)
        schedule = StepLR(optimizer, 20, 0.5) if asked["model"].get("rich") else None
        self.set_up(model, optimizer, schedule, DataLoader(samples(), batch_size=BATCH_SIZE, shuffle=True))
        self.compiled = self.model
        if asked["model"].get("compiled") == "model":
            self.compiled = torch.compile(self.model, backend="eager")
        seed_of_slot()

    def set_up(self, model: Any, optimizer: Any, schedule: Any, loader: Any) -> None:
        config = DataLoaderConfiguration(use_seedable_sampler=True)
        self.accelerator = Accelerator(
            cpu=DEVICE == "cpu", dataloader_config=config, gradient_accumulation_steps=self.micro_batches
        )
        set_seed(3)
        self.scar: SCARLoop = SCARAccelerator(
            self.accelerator, folder() / "scar", **options_for_a_loop(), continuation=self.continuation
        )
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.validation = self.accelerator.prepare(DataLoader(samples(), batch_size=24))
        self.schedule = self.accelerator.prepare(schedule) if schedule is not None else None

    # -- what each of the frameworks calls otherwise

    @property
    def synchronizes(self) -> bool:
        return bool(self.accelerator.sync_gradients)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip_gradients(self) -> None:
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)

    def accumulating(self) -> Any:
        return self.accelerator.accumulate(self.model)

    def gather(self, values: Tensor) -> Tensor:
        return self.accelerator.gather_for_metrics(values)

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    # -- the same for all

    def attempt(self) -> dict[str, int]:
        """The number of the step, and of the generation that makes it."""
        member = self.continuation.member if self.continuation is not None else None
        return {"step": self.scar.steps + 1, "generation": number_of_generation(member)}

    def gradients(self, batch: Any) -> Tensor:
        changes = "changes the batch" in asked["model"].get("habits", ())
        x, y, ids, *_ = take(batch) if changes else batch
        batches = self.scar.batches_done
        if dist.is_initialized() and dist.get_world_size() < asked["ranks"]:
            # A loop does not wait for a replacement, which takes its seconds.
            time.sleep(0.8)
        time.sleep(0.02)  # Nor for its first save, which has to be there before anybody dies.
        place("training_step", batches)
        self.random = generators()
        self.used.note(ids.tolist())
        out = self.compiled(x)
        out.register_hook(lambda gradient: place("backward", batches))
        loss = nn.functional.mse_loss(out, y)
        self.backward(loss)
        return loss

    def update(self) -> None:
        if self.synchronizes:
            world_size = dist.get_world_size() if dist.is_initialized() else 1
            random = [self.random, generators()]
            more = {"used": self.used.list(), "world_size": world_size, "random": random, "graphs": graphs()}
            write_down("steps", **self.attempt(), **more)
            place("before_step", self.scar.batches_done)
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            if self.clip:
                self.clip_gradients()
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.optimizer.zero_grad()

    def run(self) -> None:
        if self.continuation is not None and self.continuation.is_joiner:
            place("join", asked["predecessors"])
        note_saves(self.scar._schedule)
        with self.scar:
            self.scar.resume()
            for epoch in range(self.scar.epoch, self.epochs):
                breaks = asked["data"].get("breaks")
                loader = self.loader if self.batches is None or breaks else Short(self.loader, self.batches)
                for number, batch in enumerate(self.scar.batches(loader), 1):
                    with self.accumulating():
                        self.train(batch)
                    if breaks and number == self.batches:
                        break
                self.validate(epoch)

    def train(self, batch: Any) -> None:
        is_first = self.scar.batches_done % len(self.loader) % self.micro_batches == 0
        self.used.begin(batch[2].tolist(), is_first)
        if not asked.get("passes_batch", True):
            loss = self.scar.training_step(lambda: self.gradients(batch), update=self.update)
        elif asked.get("changes_batch"):
            loss = self.scar.training_step(self.gradients, [*batch, "more"], self.update)
        else:
            loss = self.scar.training_step(self.gradients, batch, self.update)
        assert loss.isfinite()
        self.scar.step()
        place("batch_end", self.scar.batches_done - 1)

    def validate(self, epoch: int) -> None:
        place("epoch_end", epoch)
        if not self.validates:
            return
        self.model.eval()
        with torch.no_grad():
            for x, y, _ in self.validation:
                out = self.model(x)  # which gives all ranks the buffers of the first
                place("validation", epoch)
                errors = self.gather((out - y).square())
                assert errors.isfinite().all()
        self.model.train()

    def write_result(self) -> None:
        state = self.scar.state.dump()
        result = {
            "rank": self.rank,
            "global_step": self.scar.steps,
            "state": {
                "state_dict": state["state_dict"],
                "optimizer_states": state["optimizer_states"],
                "schedules": state["lr_schedulers"],
            },
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
            "outages": [vars(outage) for outage in self.continuation.outages] if self.continuation else [],
            "is_global_zero": self.rank == 0,
        }
        torch.save(result, folder() / f"result-{slot}.pt")


class OfFabric(Loop):
    """In Fabric's words."""

    synchronizes = True

    def set_up(self, model: Any, optimizer: Any, schedule: Any, loader: Any) -> None:
        from lightning.fabric import Fabric

        self.fabric = Fabric(accelerator="cpu", devices=asked["ranks"], strategy="ddp")
        self.fabric.launch()
        torch.manual_seed(3)
        self.model, self.optimizer = self.fabric.setup(model, optimizer)
        self.loader = self.fabric.setup_dataloaders(loader)
        self.validation = self.fabric.setup_dataloaders(DataLoader(samples(), batch_size=24))
        self.schedule = schedule
        state = {"model": self.model, "optimizer": self.optimizer}
        state |= {"schedule": schedule} if schedule is not None else {}
        if asked["model"].get("scaled"):
            # It doubles its scale on the way.
            self.scaler = torch.amp.GradScaler("cpu", growth_interval=5)
            state |= {"scaler": self.scaler}
        self.scar = SCARLoop(folder() / "scar", state, **options_for_a_loop(), continuation=self.continuation)

    def backward(self, loss: Tensor) -> None:
        self.fabric.backward(self.scaler.scale(loss) if self.scaler is not None else loss)

    def clip_gradients(self) -> None:
        self.fabric.clip_gradients(self.model, self.optimizer, max_norm=self.clip)

    def accumulating(self) -> Any:
        return nullcontext()

    def gather(self, values: Tensor) -> Tensor:
        return self.fabric.all_gather(values)

    @property
    def rank(self) -> int:
        return self.fabric.global_rank


def main() -> None:
    begin()
    take_a_card(slot)
    loop = OfFabric() if asked["door"] == "Fabric" else Loop()
    loop.run()
    place("end", 0)
    loop.write_result()


if __name__ == "__main__":
    main()
