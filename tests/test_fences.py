"""What is saved is what was live when the batch was over, whatever changes right after it.

On a file system in memory, so that no save is skipped because the disk is slow.
"""

import time
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    Stopped,
    TinyModel,
    assert_blocks_as_lived,
    assert_same,
    cut_short,
    fit,
    loader,
    saver,
    slow_distance,
)
from lightning.pytorch.callbacks import Callback
from torch.optim import SGD
from zoo import ZOO, WithBatchNorm, WithRenormalisedEmbedding, WithValidation

from lightning_scar import load
from lightning_scar.core.restoration import restore
from lightning_scar.fences import before_optimizer_steps
from lightning_scar.storage.store import DeltaStore


@pytest.mark.parametrize("staging", ["lazy", "eager"])
@pytest.mark.parametrize("way", ZOO)
def test_saved_blocks_equal_the_live_state_of_their_step(
    way: str, staging: Literal["lazy", "eager"], memory_url: str
) -> None:
    model, callbacks, options = ZOO[way]()
    scar = saver(memory_url, fraction=0.3, block_size=64, staging=staging, policy=slow_distance)
    cut_short(scar, *callbacks, after=10, model=model, data=WithValidation(), **options)
    steps = assert_blocks_as_lived(memory_url, model.live)
    assert max(steps) == scar.stats.step
    assert len(steps) > 1, "every block is of one step: nothing was saved partially"
    assert_same(_skeleton(load(memory_url)), _skeleton(model.live[scar.stats.step]))


def _skeleton(checkpoint: dict[str, Any]) -> dict[str, Any]:
    tensors = ("state_dict", "optimizer_states", "current_model_state")
    return {key: value for key, value in checkpoint.items() if key not in tensors}


def test_a_lazy_save_is_still_being_copied_when_the_next_forward_begins(memory_url: str) -> None:
    copying = []

    class Watching(TinyModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            copying.append(scar._running is not None and scar._running._save is not None)
            return super().training_step(batch, batch_idx)

    scar = saver(memory_url, policy=slow_distance)
    fit(scar, model=Watching(), max_epochs=1)
    assert any(copying)


def test_a_tensor_that_the_forward_renormalises_is_not_starved(memory_url: str) -> None:
    model = WithRenormalisedEmbedding()
    cut_short(saver(memory_url, fraction=0.5, policy=slow_distance), after=12, model=model)
    steps = restore(DeltaStore(memory_url)).plan.steps
    newest = max(step for key, step in steps.items() if "embedding" in key)
    assert newest > 6


def test_buffers_of_every_partial_save_are_those_of_its_step(memory_url: str) -> None:
    model = WithBatchNorm()
    cut_short(saver(memory_url, fraction=0.3), after=9, model=model)
    saved = load(memory_url)["state_dict"]
    for name in ("net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"):
        assert torch.equal(saved[name], model.live[9]["state_dict"][name])


def test_validation_begins_only_when_the_save_is_copied(memory_url: str) -> None:
    class Vandal(TinyModel):
        """Writes to the weights where weight averaging does, and puts them back."""

        def on_validation_epoch_start(self) -> None:
            self.kept = [parameter.detach().clone() for parameter in self.parameters()]
            for parameter in self.parameters():
                parameter.data.zero_()
            time.sleep(0.05)

        def on_validation_epoch_end(self) -> None:
            for parameter, kept in zip(self.parameters(), self.kept, strict=True):
                parameter.data.copy_(kept)

    model = Vandal()
    # While gradients accumulate, no step stands between the begin of the save and the validation.
    options: dict[str, Any] = {"val_check_interval": 1, "num_sanity_val_steps": 0, "accumulate_grad_batches": 4}
    scar = saver(memory_url, fraction=0.3, policy=slow_distance, block_size=64)
    cut_short(scar, after=20, model=model, data=WithValidation(lambda: loader(32)), **options)
    assert_blocks_as_lived(memory_url, model.live)


def test_an_epochs_end_waits_for_the_save(memory_url: str) -> None:
    class Prunes(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            for parameter in pl_module.parameters():
                parameter.data.zero_()

    model = TinyModel()
    with pytest.raises(Stopped):
        fit(saver(memory_url, fraction=0.3, policy=slow_distance), Prunes(), _StopInEpoch(1), model=model)
    assert_blocks_as_lived(memory_url, model.live)


class _StopInEpoch(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise Stopped


def test_whoever_handles_an_exception_may_change_the_weights(memory_url: str) -> None:
    class Vandal(Callback):
        def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
            for parameter in pl_module.parameters():
                parameter.data.zero_()

    model = TinyModel()
    cut_short(saver(memory_url, fraction=0.3, policy=slow_distance), Vandal(), after=7, model=model)
    assert_blocks_as_lived(memory_url, model.live)


def test_the_fence_comes_first_and_the_saver_last_and_neither_stays(memory_url: str) -> None:
    order = []

    class Spy(Callback):
        def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
            order.extend(type(callback).__name__ for callback in trainer.callbacks)  # type: ignore[attr-defined]

    scar = saver(memory_url)
    loop = pl.Trainer(accelerator="cpu", callbacks=[scar, Spy()], logger=False, max_steps=1, enable_progress_bar=False)
    loop.fit(TinyModel(), loader())
    assert order[0] == "Fences"
    assert order[-1] == "SCARCheckpoint"
    assert "Fences" not in [type(callback).__name__ for callback in loop.callbacks]  # type: ignore[attr-defined]


def test_the_watch_of_optimizers_ends_with_the_fit(memory_url: str) -> None:
    scar = saver(memory_url)
    fit(scar, max_steps=2)
    before = scar._outside_steps, scar._stepped_outside
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    SGD([weight], lr=1.0).step()
    assert (scar._outside_steps, scar._stepped_outside) == before


@pytest.mark.parametrize(
    ("automatic", "closure", "watched"), [(True, True, False), (True, False, True), (False, True, True)]
)
def test_a_step_is_watched_where_lightning_does_not_announce_it_in_time(
    automatic: bool, closure: bool, watched: bool
) -> None:
    module = TinyModel()
    module.automatic_optimization = automatic
    loop = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    loop.strategy.connect(module)
    stepped: list[Any] = []
    watch = before_optimizer_steps(loop, stepped.append)
    optimizer = SGD(module.parameters(), lr=0.1)
    optimizer.step((lambda: 0.0) if closure else None)  # type: ignore[arg-type]
    watch.remove()
    assert stepped == [optimizer] * watched
