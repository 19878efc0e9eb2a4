"""What is saved comes back bit for bit: dtypes, layouts, models, optimizers."""

import copy
import inspect
import math
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from core_helpers import Training, assert_same, bits, round_trip
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_scar.core.restoration import load
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings
from lightning_scar.core.skeletons import is_skeleton
from lightning_scar.storage.rank_store import RankStore

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    *([torch.float8_e8m0fnu] if hasattr(torch, "float8_e8m0fnu") else []),  # torch 2.6 has no such type.
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
]


def random_bits(dtype: torch.dtype, *shape: int) -> Tensor:
    """Any bits there are, so NaNs of every kind, infinities, -0.0 and subnormal numbers too."""
    generator = torch.Generator().manual_seed(len(shape))
    high, size = (2, 1) if dtype == torch.bool else (256, dtype.itemsize)
    drawn = torch.randint(0, high, (math.prod(shape) * size,), dtype=torch.uint8, generator=generator)
    return drawn.view(dtype).view(shape)


# -- tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70_000,), (33, 7), (3, 1, 2, 5), (1,), ()], ids=str)
def test_every_bit_of_every_dtype_comes_back(dtype: torch.dtype, shape: tuple[int, ...], memory_url: str) -> None:
    checkpoint = {"state_dict": {"x": random_bits(dtype, *shape)}}
    assert_same(round_trip(memory_url, checkpoint, block_size=64 * 1024 if len(shape) == 1 else 40), checkpoint)


def test_signs_of_zero_and_payloads_of_nan_come_back(memory_url: str) -> None:
    special = torch.tensor([0x80000000, 0x7FC00001, 0xFFC0BEEF - 2**32, 0x7F800001, 1], dtype=torch.int64)
    x = special.to(torch.int32).view(torch.float32)
    assert torch.equal(bits(round_trip(memory_url, {"x": x})["x"]), bits(x))


@pytest.mark.parametrize("is_written", [True, False], ids=["the first save is written", "it is on its way"])
def test_a_zero_that_changes_its_sign_is_saved_although_its_distance_is_zero(memory_url: str, is_written: bool) -> None:
    x, go_on, commit = torch.zeros(8), threading.Event(), RankStore.commit

    def held(self: RankStore, *args: Any) -> int:
        assert go_on.wait(30)
        return commit(self, *args)

    with patch.object(RankStore, "commit", held), RunningCheckpoint(memory_url, Settings(fraction=1.0)) as running:
        running.save_now({"x": x}, step=1)
        if is_written:
            go_on.set()
            while running._writer.depth:
                time.sleep(0.001)
        x.neg_()
        running.save_now({"x": x}, step=2)
        go_on.set()
    assert torch.equal(bits(load(memory_url)["x"]), bits(x))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5, 7).t(),
        torch.randn(4, 3, 6, 5).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        torch.randn(3, 4, 5).permute(2, 0, 1),
        torch.randn(8, 9)[::2, 1::3],
        torch.randn(10)[3:7],
        torch.randn(3, 1).expand(3, 4),
        torch.randn(2, 3, dtype=torch.complex64).mH,
        torch.randn(6, dtype=torch.complex64).conj(),
        torch.randn(6, dtype=torch.complex64).conj().imag,
        nn.Parameter(torch.randn(3, 3)),
        torch.zeros(0),
        torch.zeros(4, 0, 2),
        torch.zeros(0, dtype=torch.int64),
    ],
    ids=[
        *["transposed", "channels last", "channels last 3d", "permuted", "with gaps", "a slice", "expanded"],
        *["complex transposed", "conjugated", "negated", "parameter", "empty", "empty in the middle", "empty int"],
    ],
)
def test_every_layout_comes_back(tensor: Tensor, memory_url: str) -> None:
    checkpoint = {"state_dict": {"x": tensor, "y": torch.ones(3)}}
    assert_same(round_trip(memory_url, checkpoint, block_size=16), checkpoint)


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 6), max_size=4),
    order=st.randoms(use_true_random=False),
    block_size=st.integers(1, 100),
    gap=st.booleans(),
)
@examples(max_examples=40)
def test_any_tensor_comes_back(dtype: torch.dtype, shape: list[int], order: Any, block_size: int, gap: bool) -> None:
    dimensions = list(range(len(shape)))
    order.shuffle(dimensions)
    tensor = random_bits(dtype, *shape).permute(dimensions)
    checkpoint = {"x": torch.stack([tensor, tensor], dim=-1)[..., 1] if gap and dtype.itemsize > 1 else tensor}
    url = f"memory://any-tensor-{order.random()}"
    assert_same(round_trip(url, checkpoint, block_size=block_size), checkpoint)


def test_a_conjugated_view_is_not_taken_for_its_base(memory_url: str) -> None:
    base = torch.randn(5, dtype=torch.complex64)
    checkpoint = {"base": base, "conjugate": base.conj()}
    assert_same(round_trip(memory_url, checkpoint), checkpoint)


# -- models ----------------------------------------------------------------------------------------------------------


def test_tied_weights_are_stored_once_and_are_one_tensor_again(memory_url: str) -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(64, 64, bias=False), "decoder": nn.Linear(64, 64, bias=False)})
    model["decoder"].weight = model["encoder"].weight
    with RunningCheckpoint(memory_url) as running:
        running.save_now({"state_dict": model.state_dict()}, step=1)
    stored = sum(block.nbytes for delta in running.store.deltas for block in delta.blocks if not is_skeleton(block.key))
    assert stored == 64 * 64 * 4
    loaded = load(memory_url)["state_dict"]
    assert loaded["encoder.weight"] is loaded["decoder.weight"]
    assert_same(loaded, model.state_dict())


def test_buffers_extra_state_and_everything_small_come_back(memory_url: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    model(torch.randn(4, 1, 8, 8))
    model.register_buffer("mask", torch.ones(300, 300, dtype=torch.bool).tril())
    checkpoint = {
        "state_dict": model.state_dict(),
        "loops": {"fit_loop": {"epoch": 3, "done": (True, None)}},
        "rng": {"torch": torch.get_rng_state(), "python": (3, (1, 2), None)},
        "lr_schedulers": [{"last_lr": [0.1], "base": torch.tensor(0.5)}],
    }
    loaded = round_trip(memory_url, checkpoint)
    assert_same(loaded, checkpoint)
    model.load_state_dict(loaded["state_dict"])


# -- optimizers ------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: optim.Adam(p, lr=0.01),
    "Adam, fused": lambda p: optim.Adam(p, lr=0.01, fused=True),
    "Adam, learning rate in a tensor": lambda p: optim.Adam(p, lr=torch.tensor(0.01)),
    "AdamW with amsgrad": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.01),
    "ASGD": lambda p: optim.ASGD(p, lr=0.01),
    "Adadelta": lambda p: optim.Adadelta(p, lr=0.1),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.01),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01),
    "LBFGS": lambda p: optim.LBFGS(p, lr=0.1, max_iter=3, history_size=2),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Rprop": lambda p: optim.Rprop(p, lr=0.01),
    "SparseAdam": lambda p: optim.SparseAdam(p, lr=0.01),
    **({"Muon": lambda p: optim.Muon(p, lr=0.01)} if hasattr(optim, "Muon") else {}),  # torch 2.6 has none.
}


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 6, sparse=kind == "SparseAdam")
        if kind != "SparseAdam":
            self.head = nn.Linear(6, 3, bias=kind != "Muon")

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embed(tokens)
        return self.head(embedded) if hasattr(self, "head") else embedded


class RealTraining(Training):
    def __init__(self, kind: str) -> None:
        model = Net(kind)
        super().__init__(model, OPTIMIZERS[kind](list(model.parameters())))

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        tokens = torch.randint(0, 10, (4,), generator=torch.Generator().manual_seed(self.steps))

        def loss() -> float:
            self.optimizers[0].zero_grad()
            value = self.model(tokens).square().mean()
            value.backward()
            return value.item()

        self.optimizers[0].step(loss)


def test_the_list_of_optimizers_is_that_of_torch() -> None:
    known = {name for name, kind in vars(optim).items() if inspect.isclass(kind) and issubclass(kind, Optimizer)}
    assert {kind.split()[0].rstrip(",") for kind in OPTIMIZERS} >= known - {"Optimizer"}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("staging", ["lazy", "eager"])
def test_every_optimizer_comes_back_after_every_step_and_goes_on_alike(
    kind: str, staging: Any, memory_url: str
) -> None:
    training = RealTraining(kind)
    with RunningCheckpoint(memory_url, Settings(fraction=1.0, block_size=32, staging=staging)) as running:
        for _ in range(4):
            training.step()
            training.save(running)
            assert_same(load(memory_url), training.checkpoint())
    assert running.stats.full_saves == 1

    resumed = RealTraining(kind)
    resumed.load(load(memory_url))
    for _ in range(2):
        training.step()
        resumed.step()
    assert_same(resumed.checkpoint(), training.checkpoint())


def test_several_optimizers_with_several_groups_come_back(memory_url: str) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.PReLU(), nn.Linear(4, 2))
    optimizers = (
        optim.AdamW([{"params": model[0].weight, "lr": 0.1}, {"params": [model[0].bias], "weight_decay": 0.0}]),
        optim.SGD([*model[1].parameters(), *model[2].parameters()], lr=0.1, momentum=0.9),
    )
    training = Training(model, *optimizers)
    with RunningCheckpoint(memory_url, Settings(fraction=1.0, block_size=16)) as running:
        for _ in range(3):
            training.step()
            training.save(running)
    assert_same(load(memory_url), training.checkpoint())


def test_a_scalar_parameter_and_its_moments_come_back(memory_url: str) -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.0))
    training = Training(model, optim.Adam(model.parameters()))
    with RunningCheckpoint(memory_url, Settings(fraction=1.0)) as running:
        for _ in range(3):
            training.step()
            training.save(running)
    assert_same(load(memory_url), training.checkpoint())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_training_in_another_precision_comes_back(dtype: torch.dtype, memory_url: str) -> None:
    model = nn.Conv2d(4, 8, 3).to(dtype).to(memory_format=torch.channels_last)
    training = Training(model, optim.Adam(model.parameters()))
    with RunningCheckpoint(memory_url, Settings(fraction=1.0, block_size=64)) as running:
        for _ in range(3):
            training.step()
            training.save(running)
    assert_same(load(memory_url), training.checkpoint())
    assert load(memory_url)["state_dict"]["weight"].is_contiguous(memory_format=torch.channels_last)


def test_what_was_loaded_is_not_what_is_still_being_trained(memory_url: str) -> None:
    training = RealTraining("Adam")
    training.step()
    with RunningCheckpoint(memory_url) as running:
        training.save(running)
    before = copy.deepcopy(training.checkpoint())
    training.step()
    assert_same(load(memory_url), before)
