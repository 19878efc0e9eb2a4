"""What needs a CUDA device: tensors there, and ranks that share one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from core_helpers import Training, assert_same, drain
from ordered_saves import LateTraining, saved
from ranks import run_ranks
from test_stager import staging_held
from torch import nn, optim

from lightning_scar import load
from lightning_scar.core.devices import AcceleratorQueue
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_device(size: int = 256) -> Training:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size), nn.BatchNorm1d(size), nn.Linear(size, size)).cuda()
    training = Training(model, optim.Adam(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    training.optimizers[0].step()
    return training


def on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    return [on_cpu(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("staging", ["lazy", "eager"])
def test_a_save_holds_the_values_from_before_the_step_that_follows(tmp_path: Path, staging: str) -> None:
    training = on_device()
    with RunningCheckpoint(tmp_path, Settings(fraction=1.0, staging=staging)) as running:
        for _ in range(4):
            training.steps += 1
            expected = on_cpu(training.checkpoint())
            training.begin(running, wait=True)
            running.stage()
            running.fence()
            with torch.no_grad():
                for parameter in training.model.parameters():
                    parameter.mul_(1.5)
    assert_same(load(tmp_path), expected)


def share_a_device(rank: int, folder: Path) -> Any:
    training = on_device()
    with RunningCheckpoint(folder, ranks=Ranks.of_default_group()) as running:
        training.steps = 1
        training.begin(running, wait=True)
        running.fence()
    return on_cpu(training.checkpoint())


def restore_on_device(rank: int, folder: Path) -> Any:
    with RunningCheckpoint(folder, ranks=Ranks.of_default_group()) as running:
        training = on_device()
        training.load(running.restore().checkpoint)
        return on_cpu(training.checkpoint())


def test_ranks_that_share_a_device_save_and_restore(tmp_path: Path) -> None:
    saved = run_ranks(share_a_device, 2, tmp_path)
    for restored in run_ranks(restore_on_device, 2, tmp_path):
        assert_same(restored, saved[0])


# -- order -------------------------------------------------------------------------------------------------------------

#: Cycles: some hundredths of a second.
LONG = 50_000_000


class Catching:
    """A device that is made to catch up all the time."""

    def place(self, model: nn.Module) -> None:
        model.cuda()

    @contextmanager
    def training(self) -> Iterator[None]:
        yield

    def settle(self) -> None:
        torch.cuda.synchronize()


class Late(Catching):
    """A device whose side stream is late, or whose training is, by turns."""

    @contextmanager
    def training(self) -> Iterator[None]:
        beside, turns = AcceleratorQueue.beside, iter(range(1_000_000))

        def late(self: AcceleratorQueue, work: Callable[[], None], after: torch.Event) -> torch.Event:
            def slow() -> None:
                if next(turns) % 2:
                    torch.cuda._sleep(LONG)
                work()

            return beside(self, slow, after)

        with patch.object(AcceleratorQueue, "beside", late):
            yield
        torch.cuda.synchronize()

    def settle(self) -> None:
        torch.cuda._sleep(LONG // 10)


WAYS: list[dict[str, Any]] = [{"staging": "lazy"}, {"staging": "eager"}, {"staging": "lazy", "refresh": None}]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_save_holds_the_values_of_its_own_step_however_late_the_device_is(
    way: dict[str, Any], tmp_path: Path
) -> None:
    assert saved(tmp_path / "late", Late(), **way) == saved(tmp_path / "at-once", Catching(), **way)


def test_without_its_order_a_save_is_wrong(tmp_path: Path) -> None:
    with patch.object(AcceleratorQueue, "hold", lambda self, mark: None):
        found = saved(tmp_path / "late", Late())
    assert found != saved(tmp_path / "at-once", Catching())


@contextmanager
def no_waiting() -> Iterator[None]:
    """Where any thread that waits for the device gets an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_training_thread_never_waits_for_the_device(tmp_path: Path) -> None:
    device = Catching()
    training = LateTraining(device)
    with RunningCheckpoint(tmp_path, Settings(fraction=0.5, block_size=128)) as running:
        for step in range(4):
            training.step()
            if not step:
                training.save(running)
                continue
            # The mode is that of all threads: the one that stages, which may wait, has its turn between.
            with staging_held() as go:
                with no_waiting():
                    training.begin(running, wait=True)
                    running.stage()
                    training.forward()
                go.set()
                assert running._stager._staging is not None
                running._stager._staging.result()
                with no_waiting():
                    running.fence()
            drain(running)
