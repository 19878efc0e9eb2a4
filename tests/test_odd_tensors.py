"""Parameters without a storage of their own: sparse ones, lazy ones, and subclasses that wrap another tensor."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyModel, assert_same, cut_short, fit, loader, make_trainer, saver
from test_adapting_models import EXACT, values
from torch import Tensor, nn
from torch.optim import SGD, SparseAdam
from torch.serialization import safe_globals
from torch.utils._pytree import tree_map_only

from lightning_scar import SCARLoop, load
from lightning_scar.core.optimizer_loading import owners_of_states
from lightning_scar.core.restoration import restore
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.skeleton import heavy, held_bytes, identity, take_apart
from lightning_scar.storage.places import open_store


def sparse(width: int = 8) -> Tensor:
    return torch.eye(width).to_sparse()


class Odd(TinyModel):
    """Remembers nothing, because not all tensors can be deep-copied."""

    def on_train_batch_end(self, *args: Any) -> None: ...
    def on_train_end(self) -> None: ...


class WithSparse(Odd):
    """A graph.

    Args:
        trained: Whether it is trained.
        width: Of the data; a large one is repeated.
    """

    def __init__(self, trained: bool = False, width: int = 8) -> None:
        super().__init__(optimizer=lambda parameters: SGD(parameters, lr=0.01))
        self.graph = nn.Parameter(sparse(width), requires_grad=trained)
        self.register_buffer("also", sparse().to_sparse_csr())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.sparse.mm(self.graph, x.repeat(1, len(self.graph) // 8).T).T[:, :8])


class WithUnusedLazy(Odd):
    """A branch that no batch reaches has no shape when it is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.LazyLinear(3)

    def configure_optimizers(self) -> Any:
        return SGD(self.net.parameters(), lr=0.01)


class WithSparseGradients(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8, sparse=True)
        self.automatic_optimization = False

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.embedding(torch.arange(len(x))))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append((self.current_epoch, 0.0))
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [SGD(self.net.parameters(), lr=0.01, momentum=0.9), SparseAdam(self.embedding.parameters(), lr=0.01)]


class Doubled(Tensor):
    """A subclass that wraps one plain tensor, whose values are twice as large as its own."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Doubled":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["inner"], "a context"

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> "Doubled":
        assert context == "a context"
        return Doubled(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("copy_", "detach", "clone", "zeros_like", "_to_copy", "mul_", "add_", "zero_", "empty_like"):
            found = function(*(tree_map_only(Doubled, lambda t: t.inner, args)), **(kwargs or {}))
            return args[0] if name.endswith("_") and name != "_to_copy" else Doubled(found)
        args, kwargs = tree_map_only(Doubled, lambda t: t.inner * 2, (args, kwargs or {}))
        return function(*args, **kwargs)


class WithWrapped(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(Doubled(torch.ones(128, 256)))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * (self.scale * torch.ones(128, 256)).mean()

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.01, momentum=0.9, foreach=False)


ODD: dict[str, Callable[[], TinyModel]] = {
    "frozen and sparse": WithSparse,
    "trained and sparse": lambda: WithSparse(trained=True),
    "sparse gradients": WithSparseGradients,
    "lazy to the end": WithUnusedLazy,
    "wrapped": WithWrapped,
}


def plain(model: TinyModel) -> list[Any]:
    found = []
    for optimizer in model.trainer.optimizers:
        found += values(model, optimizer)
    return [
        value.to_dense() if isinstance(value, Tensor) and value.layout != torch.strided else value for value in found
    ]


@pytest.mark.parametrize("odd", ODD)
def test_a_run_with_odd_tensors_resumes_exactly(odd: str, tmp_path: Path) -> None:
    whole = ODD[odd]()
    make_trainer(max_epochs=2, enable_checkpointing=False).fit(whole, loader())
    # What has no shape yet is of a class of its own.
    with warnings.catch_warnings(), safe_globals([nn.parameter.UninitializedParameter, Doubled]):
        warnings.filterwarnings("error", message="lightning-scar: .*cannot be cut")
        cut_short(saver(tmp_path, **EXACT), after=8, model=ODD[odd]())
        resumed = fit(saver(tmp_path, **EXACT), model=ODD[odd]())
    assert len(resumed.seen) == 8
    skip = 2 if odd == "lazy to the end" else 0
    assert_same(plain(resumed)[: -skip or None], plain(whole)[: -skip or None])


def test_a_large_sparse_tensor_is_named_once_with_its_bytes(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"1 tensors cannot be cut into blocks.*\(81.9 kB\): state_dict/graph"
    ) as warned:
        fit(saver(tmp_path, **EXACT), model=WithSparse(width=4096), max_epochs=1)
    assert len([w for w in warned if "cannot be cut" in str(w.message)]) == 1
    assert_same(load(tmp_path)["state_dict"]["graph"].to_dense(), sparse(4096).to_dense())


def test_a_loop_with_a_sparse_parameter(tmp_path: Path) -> None:
    model = WithSparse(trained=True)
    optimizer = model.configure_optimizers()
    with SCARLoop(tmp_path, {"model": model, "optimizer": optimizer}, every_n_steps=1) as scar:
        scar.resume()
        for batch in loader():
            optimizer.zero_grad()
            model.loss(batch).backward()
            optimizer.step()
            scar.step()
    again = WithSparse(trained=True)
    state = {"model": again, "optimizer": again.configure_optimizers()}
    with SCARLoop(tmp_path, state) as scar:
        assert scar.resume() == 8
    assert_same(again.graph.detach().to_dense(), model.graph.detach().to_dense())


def test_a_wrapped_tensor_is_cut_like_any_other_with_its_optimizers_state(memory_url: str) -> None:
    parameter = nn.Parameter(Doubled(torch.rand(128, 256)))
    optimizer = SGD([parameter], lr=0.1, momentum=0.9)
    optimizer.state[parameter]["momentum_buffer"] = Doubled(torch.rand(128, 256))
    state = {"state_dict": {"w": parameter.detach()}, "optimizer_states": [optimizer.state_dict()]}
    with RunningCheckpoint(memory_url) as running:
        running.save_now(state, 1, optimizers={("optimizer_states", 0): optimizer}, parameters=[parameter])
    with safe_globals([Doubled]):
        restored = restore(open_store(memory_url))
    [group] = restored.map.groups
    assert len(group) > 1
    assert [slot.name for slot in group.slots] == ["param", "momentum_buffer.inner"]
    assert owners_of_states(restored.map) == {(0, 0): (("w",), (128, 256))}
    moment = restored.checkpoint["optimizer_states"][0]["state"][0]["momentum_buffer"]
    for found, saved in ((restored.checkpoint["state_dict"]["w"], parameter), (moment, optimizer.state[parameter])):
        assert type(found) is Doubled
        saved = saved["momentum_buffer"] if isinstance(saved, dict) else saved
        assert torch.equal(found.inner, saved.detach().inner)


class Coded(Doubled):
    """Two inner tensors that belong together."""

    def __init__(self, inner: Tensor) -> None:
        super().__init__(inner)
        self.scales = torch.ones(1)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["inner", "scales"], None


def test_what_wraps_several_tensors_stays_whole() -> None:
    coded = Coded(torch.ones(256, 256))
    skeleton, leaves = take_apart({"state_dict": {"coded": coded}}, {})
    assert not leaves
    assert skeleton["tree"]["state_dict"]["coded"] is coded
    assert [leaf.path for leaf in heavy(skeleton["tree"])] == [("state_dict", "coded")]
    assert held_bytes(coded) == 4 * 256 * 256 + 4


def test_references_to_one_wrapped_tensor_are_the_same() -> None:
    one, other = Doubled(torch.ones(3)), Doubled(torch.ones(3))
    assert identity(one) == identity(one.detach()) == identity(one.inner)
    assert identity(one) != identity(other)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_the_bytes_of_sparse_tensors(layout: Any) -> None:
    found = torch.eye(100).to_sparse(layout=layout)
    pointers = 100 if layout == torch.sparse_coo else 101
    assert held_bytes(found) == 100 * 4 + 8 * (100 + pointers)
