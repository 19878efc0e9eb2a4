"""Loud tests of the private parts of Lightning that make a process a replacement, in one process.

When one of these fails after an upgrade, the function that it calls is what to look at.
"""

import copy
import csv
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import BATCH_SIZE, BATCHES, TinyModel, assert_same, loader, make_trainer, samples
from lightning.fabric.utilities.rank_zero import rank_zero_only as utils_rank_zero_only
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_scar.core.rank_batches import RankBatches
from lightning_scar.lightning import loggers, private, progress, replacement
from lightning_scar.lightning.data import TrainingData


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(samples())


DATA = {
    "map": lambda: loader(),
    "workers": lambda: loader(num_workers=1),
    "iterable": lambda: DataLoader(Stream(), batch_size=4),
}


class Source(SingleDeviceStrategy):
    """Keeps what a joiner would get behind one of its steps."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step
        self.handed_over: Any = None
        self.weights: Any = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().optimizer_step(*args, **kwargs)
        trainer = self.lightning_module.trainer
        if trainer.global_step + 1 == self.step:
            checkpoint = private.dump_checkpoint(trainer)
            self.handed_over = copy.deepcopy((checkpoint, replacement.live_state(trainer, checkpoint)))
            self.weights = copy.deepcopy(self.lightning_module.state_dict())
        return output


class Joiner(SingleDeviceStrategy):
    """Takes it in the place of its own first step."""

    def __init__(self, handed_over: Any) -> None:
        super().__init__()
        self.handed_over = handed_over

    def optimizer_step(self, optimizer: Any, closure: Any, *args: Any, **kwargs: Any) -> Any:
        if self.handed_over is None:
            return super().optimizer_step(optimizer, closure, *args, **kwargs)
        closure()
        trainer = self.lightning_module.trainer
        replacement.load_state(trainer, *self.handed_over)
        TrainingData.of(trainer).seek()
        self.lightning_module.zero_grad()
        self.handed_over = None
        return None


@pytest.fixture(autouse=True)
def rank() -> Iterator[None]:
    before = rank_zero_only.rank
    yield
    rank_zero_only.rank = utils_rank_zero_only.rank = before


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("place", ["the middle of an epoch", "an epoch's last step"])
def test_a_joiner_goes_on_as_the_one_that_its_state_comes_from(data: str, place: str, accumulated: int) -> None:
    a_epoch = BATCHES // accumulated
    options: dict[str, Any] = {"max_epochs": 3, "accumulate_grad_batches": accumulated, "enable_checkpointing": False}
    step = a_epoch + (a_epoch // 2 if place == "the middle of an epoch" else a_epoch)
    source, model, other = Source(step), TinyModel(), TinyModel()
    trainer = make_trainer(strategy=source, **options)
    TrainingData.of(trainer)
    trainer.fit(model, DATA[data](), DATA["map"]())
    torch.nn.init.zeros_(other.net[0].weight)
    joiner = make_trainer(strategy=Joiner(source.handed_over), **options)
    TrainingData.of(joiner)
    replacement.prepare_joiner(joiner)
    joiner.fit(other, DATA[data](), DATA["map"]())
    # Of what it took its state from, it sees and makes all that comes later.
    assert other.seen[accumulated:] == model.seen[step * accumulated :]
    assert (joiner.global_step, joiner.current_epoch) == (trainer.global_step, trainer.current_epoch)
    for key in ("state_dict", "optimizer_states"):
        assert_same(other.final[key], model.final[key])
    assert_same(dict(joiner.callback_metrics), dict(trainer.callback_metrics))


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_a_joiner_takes_its_place_in_a_shared_epoch(kind: Any, tmp_path: Path) -> None:
    """The run went on with another batch size, and lost a worker in the same epoch."""
    data = samples()

    def make(batch_size: int = 5) -> Any:
        return kind(data, batch_size=batch_size, sampler=DistributedSampler(data, 1, 0))

    class Keep(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                torch.save(private.dump_checkpoint(trainer), tmp_path / "before.ckpt")

    trainer = make_trainer(Keep(), max_epochs=1, enable_checkpointing=False)
    TrainingData.of(trainer)
    trainer.fit(TinyModel(), make(4))
    source, model, other = Source(2 + 3), TinyModel(), TinyModel()
    trainer = make_trainer(strategy=source, max_epochs=2, enable_checkpointing=False)
    TrainingData.of(trainer)
    trainer.fit(model, make(), ckpt_path=tmp_path / "before.ckpt")
    order = [*DistributedSampler(data, 1, 0)][2 * 4 :]
    assert [total for _, total in model.seen[:5]] == [float(data[order[i : i + 5]][0].sum()) for i in range(0, 24, 5)]
    joiner = make_trainer(strategy=Joiner(source.handed_over), max_epochs=2, enable_checkpointing=False)
    TrainingData.of(joiner)
    replacement.prepare_joiner(joiner)
    joiner.fit(other, make())
    assert other.seen[1:] == model.seen[3:]


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_a_joiner_knows_the_batches_of_others(kind: Any) -> None:
    """It has begun with another epoch than that in which it takes its place."""
    data = samples(2 * BATCHES)
    loaders = [kind(data, batch_size=BATCH_SIZE, sampler=DistributedSampler(data, 2, i)) for i in (0, 1, 1)]
    whole = []
    for epoch in range(3):
        loaders[0].sampler.set_epoch(epoch)
        whole += [(epoch, float(x.sum())) for x, _ in loaders[0]]
    found = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            data = TrainingData.of(trainer)
            (order,) = data._orders
            others = RankBatches(order.loader, order, 1, 2)
            assert others.why_unknown(0, 0) is None
            ((x, _),) = others.batches(0, [data.position])
            found.append((trainer.current_epoch, float(x.sum())))

    source, model = Source(BATCHES + 5), TinyModel()
    trainer = make_trainer(strategy=source, max_epochs=3, enable_checkpointing=False)
    TrainingData.of(trainer)
    trainer.fit(model, loaders[1])
    joiner = make_trainer(Look(), strategy=Joiner(source.handed_over), max_epochs=3, enable_checkpointing=False)
    TrainingData.of(joiner)
    replacement.prepare_joiner(joiner)
    joiner.fit(TinyModel(), loaders[2])
    assert found[1:] == whole[BATCHES + 5 :]


def test_a_joiner_neither_validates_nor_resumes_nor_writes(tmp_path: Path) -> None:
    seen: list[str] = []

    class Watch(Callback):
        def on_sanity_check_start(self, *args: Any) -> None:
            seen.append("sanity check")

    first = make_trainer(max_epochs=1, default_root_dir=tmp_path)
    first.fit(TinyModel(), loader())
    path = tmp_path / "first.ckpt"
    first.save_checkpoint(path)
    trainer = make_trainer(Watch(), max_epochs=2, default_root_dir=tmp_path)
    replacement.prepare_joiner(trainer)
    assert rank_zero_only.rank == utils_rank_zero_only.rank == 1
    model = TinyModel()
    trainer.fit(model, loader(), loader(), ckpt_path=path)
    assert not seen
    assert len(model.seen) == 2 * BATCHES


class Averages(Callback):
    """Puts other weights into checkpoints."""

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: value * 2 for name, value in checkpoint["state_dict"].items()}


@pytest.mark.parametrize("averages", [False, True])
def test_load_weights(averages: bool) -> None:
    """What a step changes, but not the place in the loops, nor the averages that a callback puts into checkpoints."""
    source, other = Source(5), TinyModel()
    callbacks = [Averages()] if averages else []
    make_trainer(*callbacks, strategy=source, max_epochs=1, enable_checkpointing=False).fit(TinyModel(), loader())
    checkpoint, live = source.handed_over

    class Take(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                before = copy.deepcopy(private.dump_checkpoint(trainer)["loops"])
                replacement.load_weights(trainer, checkpoint, live)
                now = private.dump_checkpoint(trainer)
                assert_same(now["state_dict"], source.weights)
                assert_same(now["optimizer_states"], checkpoint["optimizer_states"])
                assert now["loops"] == before
                trainer.should_stop = True

    trainer = make_trainer(Take(), max_epochs=1, enable_checkpointing=False)
    trainer.fit(other, loader())
    assert trainer.global_step == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [8, 16]),
        ({"max_steps": 5}, [5]),
        ({"val_check_interval": 3}, [3, 6, 8, 11, 14, 16]),
        ({"limit_train_batches": 6}, [6, 12]),
    ],
)
def test_leaves_training_next(options: dict[str, Any], expected: list[int]) -> None:
    found: list[int] = []

    class Ask(SingleDeviceStrategy):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
            output = super().optimizer_step(*args, **kwargs)
            if private.leaves_training_next(self.lightning_module.trainer):
                found.append(self.lightning_module.trainer.global_step + 1)
            return output

    trainer = make_trainer(strategy=Ask(), enable_checkpointing=False, **{"max_epochs": 2, **options})
    trainer.fit(TinyModel(), loader(), loader(2))
    assert found == expected


@pytest.mark.parametrize("accumulated", [1, 2, 3])
def test_undo_unfinished_step(accumulated: int) -> None:
    """At any moment of a step it leads to the counters of the moment before it."""
    checked: list[int] = []

    def check(trainer: pl.Trainer, *args: Any) -> None:
        checkpoint = copy.deepcopy(private.dump_checkpoint(trainer))
        progress.undo_unfinished_step(checkpoint, accumulated)
        loop, steps = checkpoint["loops"]["fit_loop"], trainer.global_step
        batches = loop["epoch_loop.batch_progress"]
        for counts in (batches["current"], batches["total"]):
            assert set(counts.values()) == {accumulated * steps}, counts
        made = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        assert made["total"] == made["current"] == {"ready": steps, "completed": steps}
        checked.append(steps)

    class Watch(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            check(trainer)

        def on_before_backward(self, trainer: pl.Trainer, *args: Any) -> None:
            check(trainer)

        on_before_optimizer_step = on_before_backward

    trainer = make_trainer(Watch(), max_epochs=1, accumulate_grad_batches=accumulated, enable_checkpointing=False)
    trainer.fit(TinyModel(), loader(batches=9))
    assert set(checked) == set(range(trainer.global_step))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_compute_gradient_transferred(precision: Any) -> None:
    """As a training step of its own computes it, and nothing else changes."""
    computed: list[list[Tensor]] = []

    class Compute(Callback):
        batch: Any = None

        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            self.batch = batch

        def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            expected = [p.grad.clone() for p in module.parameters()]
            private.compute_gradient(trainer, private.transferred(trainer, self.batch))
            computed.append(expected)
            for parameter, gradient in zip(module.parameters(), expected, strict=True):
                assert torch.equal(parameter.grad, gradient)

    trainer = make_trainer(Compute(), max_epochs=1, precision=precision, enable_checkpointing=False)
    trainer.fit(TinyModel(), loader())
    assert len(computed) == trainer.global_step == BATCHES
    assert any(gradient.abs().sum() > 0 for gradient in computed[0])


def test_silence_sigterm_broadcast() -> None:
    advance = inspect.getsource(_TrainingEpochLoop.advance)
    says_so = "self._broadcast_sigterm_tensor()" in advance
    # Lightning 2.5 does not broadcast: each rank ends by itself.
    assert says_so or "broadcast" not in inspect.getsource(_TrainingEpochLoop), (
        "Lightning agrees on SIGTERM in another way: silence that"
    )
    trainer = make_trainer(max_epochs=1)
    private.silence_sigterm_broadcast(trainer)
    assert "_broadcast_sigterm_tensor" in vars(trainer.fit_loop.epoch_loop)


def test_batch_size() -> None:
    trainer = make_trainer()
    assert private.batch_size(trainer, {"x": torch.zeros(6, 2)}) == 6
    assert private.batch_size(trainer, object()) == 1


# -- logs --------------------------------------------------------------------------------------------------------------


def logged(folder: Path) -> list[tuple[int, float]]:
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def test_a_csv_file_goes_on_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the other one has a process, here it has a Trainer."""
    (tmp_path / "state").mkdir()
    monkeypatch.setenv("LIGHTNING_SCAR_STATE", str(tmp_path / "state"))

    class Note(Callback):
        def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
            loggers.share_versions(trainer)

    for _ in range(2):
        logger = CSVLogger(tmp_path / "logs", flush_logs_every_n_steps=1)
        trainer = make_trainer(Note(), max_epochs=1, logger=logger, log_every_n_steps=1, enable_checkpointing=False)
        loggers.reuse_versions(trainer)
        loggers.append_to_files(trainer)
        trainer.fit(TinyModel(), loader())
    assert [step for step, _ in logged(tmp_path / "logs")] == [*range(BATCHES), *range(BATCHES)]
