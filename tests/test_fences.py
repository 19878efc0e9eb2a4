"""What is saved is what was live when the batch was over, whatever changes right after it.

On a file system in memory, so that no save is skipped because the disk is slow.
"""

import time
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    StopBeforeTheSave,
    Stopped,
    TinyModel,
    assert_blocks_as_lived,
    assert_same,
    cut_short,
    fit,
    lived_in,
    loader,
    saver,
    slow_distance,
)
from lightning.pytorch.callbacks import Callback
from lived import assert_as_lived, saved_blocks
from torch.optim import SGD, Adam
from zoo import ZOO, WithBatchNorm, WithRenormalisedEmbedding, WithValidation

from lightning_scar import SCARCheckpoint, load
from lightning_scar.lightning.progress import KEY
from lightning_scar.lightning.step_count import before_optimizer_steps


@pytest.mark.sampled(3)
@pytest.mark.parametrize("refresh", ["auto", None])
@pytest.mark.parametrize("staging", ["lazy", "eager"])
@pytest.mark.parametrize("way", ZOO)
def test_saved_blocks_equal_the_live_state_of_their_step(
    way: str, staging: Literal["lazy", "eager"], refresh: Literal["auto"] | None, memory_url: str
) -> None:
    model, callbacks, options = ZOO[way]()
    scar = saver(memory_url, fraction=0.3, block_size=64, staging=staging, refresh=refresh, policy=slow_distance)
    with pytest.raises(Stopped):
        fit(scar, *callbacks, StopBeforeTheSave(12), model=model, data=WithValidation(), **options)
    steps = assert_as_lived(memory_url, lived_in(model.live))
    bases, refreshes = ({step for step in found if step is not None} for found in zip(*steps, strict=True))
    assert max(bases) == scar.stats.step
    assert len(bases) > 1, "every block is of one step: nothing was saved partially"
    assert refreshes == ({scar.stats.step} if refresh else set())
    assert_same(_skeleton(load(memory_url)), _skeleton(model.live[scar.stats.step]))


class WithSpareWeights(TinyModel):
    """They take longer to measure than a forward and backward pass; a fused optimizer leaves their counters alone."""

    def __init__(self) -> None:
        super().__init__(optimizer=partial(Adam, lr=0.01, fused=True))
        self.spare = torch.nn.Parameter(torch.randn(1 << 12, 1 << 9))

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss(batch) + self.spare[0].sum()

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.param_groups[0]["weight_decay"] = 0.1
        return optimizer


class WritesFirst(Callback):
    """Has the last save written before the next one begins, so that none is skipped."""

    def __init__(self, scar: SCARCheckpoint) -> None:
        self.scar = scar

    def on_train_batch_end(self, *args: Any) -> None:
        assert self.scar._running is not None
        self.scar._running._writer.drain()


def test_a_refresh_is_encoded_before_the_weights_change_however_long_that_takes(memory_url: str) -> None:
    model = WithSpareWeights()
    scar = saver(memory_url, fraction=0.3)
    with pytest.raises(Stopped):
        fit(scar, WritesFirst(scar), StopBeforeTheSave(4), model=model)
    steps = assert_as_lived(memory_url, lived_in(model.live))
    assert {refreshed for _, refreshed in steps} - {None} == {3}


def _skeleton(checkpoint: dict[str, Any]) -> dict[str, Any]:
    # Nor what a save adds to Lightning's dict.
    others = ("state_dict", "optimizer_states", "current_model_state", KEY)
    return {key: value for key, value in checkpoint.items() if key not in others}


def test_a_lazy_save_is_still_being_copied_when_the_next_forward_begins(memory_url: str) -> None:
    copying = []

    class Watching(TinyModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            copying.append(scar._running is not None and scar._running._save is not None)
            return super().training_step(batch, batch_idx)

    scar = saver(memory_url, policy=slow_distance)
    fit(scar, model=Watching(), max_epochs=1)
    assert any(copying)


@pytest.mark.parametrize("refresh", ["auto", None])
def test_a_tensor_that_the_forward_renormalises_is_not_starved(
    refresh: Literal["auto"] | None, memory_url: str
) -> None:
    model = WithRenormalisedEmbedding()
    scar = saver(memory_url, fraction=0.5, block_size=64, refresh=refresh, policy=slow_distance)
    cut_short(scar, after=12, model=model)
    assert_blocks_as_lived(memory_url, model.live)
    own = [saved for saved in saved_blocks(memory_url) if "embedding" in saved.key]
    assert max(saved.step for saved in own) > 6
    assert {saved.refreshed.step for saved in own if saved.refreshed} == ({scar.stats.step} if refresh else set())


@pytest.mark.parametrize("refresh", ["auto", None])
def test_buffers_of_every_partial_save_are_those_of_its_step(refresh: Literal["auto"] | None, memory_url: str) -> None:
    model = WithBatchNorm()
    cut_short(saver(memory_url, fraction=0.3, refresh=refresh), after=9, model=model)
    saved = load(memory_url)["state_dict"]
    for name in ("net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"):
        assert torch.equal(saved[name], model.live[9]["state_dict"][name])


@pytest.mark.parametrize("refresh", ["auto", None])
def test_validation_begins_only_when_the_save_is_copied(refresh: Literal["auto"] | None, memory_url: str) -> None:
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
    scar = saver(memory_url, fraction=0.3, refresh=refresh, policy=slow_distance, block_size=64)
    cut_short(scar, after=20, model=model, data=WithValidation(lambda: loader(32)), **options)
    assert_blocks_as_lived(memory_url, model.live)


@pytest.mark.parametrize("refresh", ["auto", None])
def test_an_epochs_end_waits_for_the_save(refresh: Literal["auto"] | None, memory_url: str) -> None:
    class Prunes(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            for parameter in pl_module.parameters():
                parameter.data.zero_()

    model = TinyModel()
    with pytest.raises(Stopped):
        fit(
            saver(memory_url, fraction=0.3, refresh=refresh, policy=slow_distance),
            Prunes(),
            _StopInEpoch(1),
            model=model,
        )
    assert_blocks_as_lived(memory_url, model.live)


class _StopInEpoch(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise Stopped


@pytest.mark.parametrize("refresh", ["auto", None])
def test_whoever_handles_an_exception_may_change_the_weights(refresh: Literal["auto"] | None, memory_url: str) -> None:
    class Vandal(Callback):
        def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
            for parameter in pl_module.parameters():
                parameter.data.zero_()

    model = TinyModel()
    cut_short(saver(memory_url, fraction=0.3, refresh=refresh, policy=slow_distance), Vandal(), after=7, model=model)
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
    before = vars(scar._steps).copy()
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    SGD([weight], lr=1.0).step()
    assert vars(scar._steps) == before


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
