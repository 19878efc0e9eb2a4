"""The model decides what it can load; who is refused is told why, and loses nothing."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import WAYS, Compiled, NoLongerCompiled
from helpers import (
    ADAM,
    StopAfter,
    Stopped,
    TinyModel,
    WithABody,
    assert_blocks_as_lived,
    assert_same,
    cut_short,
    fit,
    loader,
    make_trainer,
    saver,
)
from torch import nn
from torch.optim import SGD, Adafactor, Adam, Optimizer

from lightning_scar import SCARLoop, load
from lightning_scar.core.compatibility import ModelMismatchError

EXACT: dict[str, Any] = {"fraction": 1.0, "full_every_n_saves": 1}


def values(model: TinyModel, optimizer: Optimizer) -> list[Any]:
    """All that a training changes, whatever it is called."""
    moments = [state[key] for state in optimizer.state_dict()["state"].values() for key in sorted(state)]
    return [*model.parameters(), *model.buffers(), *getattr(model, "history", []), *moments]


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_adapts_resumes_exactly(way: str, tmp_path: Path) -> None:
    whole = WAYS[way].saved()
    make_trainer(max_epochs=2, enable_checkpointing=False).fit(whole, loader())
    cut_short(saver(tmp_path, **EXACT), after=8, model=WAYS[way].saved())
    resumed = fit(saver(tmp_path, **EXACT), model=WAYS[way].resumed())
    assert len(resumed.seen) == 8
    assert_same(values(resumed, resumed.trainer.optimizers[0]), values(whole, whole.trainer.optimizers[0]))


@pytest.mark.parametrize("way", [way for way in WAYS if "left out" not in way])
def test_a_model_that_adapts_resumes_exactly_in_a_loop(way: str, tmp_path: Path) -> None:
    whole = train(WAYS[way].saved(), tmp_path / "whole")
    train(WAYS[way].saved(), tmp_path / "cut", after=5)
    resumed = train(WAYS[way].resumed(), tmp_path / "cut")
    assert_same(resumed, whole)


def train(model: TinyModel, dirpath: Path, after: int = 8) -> list[Any]:
    """One epoch in a plain loop, or less; beside the model there is another one, so that each loads its part."""
    torch.manual_seed(1)
    other = nn.Linear(1, 1)
    optimizer = model.configure_optimizers()
    state = {"model": model, "other": other, "optimizer": optimizer}
    try:
        with SCARLoop(dirpath, state, every_n_steps=1, save_on_exception=False, **EXACT) as scar:
            done = scar.resume()
            for number, batch in enumerate(loader()):
                if number < done:
                    continue
                if number == after:
                    raise Stopped
                optimizer.zero_grad()
                other(model.loss(batch).view(1)).square().sum().backward()
                optimizer.step()
                scar.step()
    except Stopped:
        pass
    return [*values(model, optimizer), *other.parameters()]


# -- refused -------------------------------------------------------------------------------------------------------


class TwoRates(TinyModel):
    """The same model, whose optimizer has two groups."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": list(part.parameters())} for part in (self.net[2], self.net[0])]
        return Adam(groups, lr=0.01)


class Deeper(TinyModel):
    """A layer more, before the others, and a head of another size."""

    def __init__(self, optimizer: Any = ADAM) -> None:
        super().__init__(optimizer=optimizer)
        self.first = nn.Linear(8, 8)
        self.net[2] = nn.Linear(32, 3)

    def forward(self, x: Any) -> Any:
        return self.net(self.first(x)).mean(1, keepdim=True)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([*self.first.parameters(), *self.net.parameters()])


class SaysNothing(WithABody):
    def load_state_dict(self, state_dict: Any, strict: bool = True, **options: Any) -> Any:
        return super().load_state_dict(state_dict, strict=False, **options)


REFUSED: dict[str, tuple[Callable[[], TinyModel], list[str]]] = {
    "another model": (Deeper, ["missing: first.weight", r"reshaped: net.2.bias is (1,) in the checkpoint, (3,)"]),
    "another optimizer": (TwoRates, ["[[4]] parameters in the groups of each, now [[2, 2]]"]),
    "nothing in common": (WithABody, ["missing: body.0.weight", "extra: net.0.weight"]),
    "nothing loaded": (SaysNothing, ["nothing of", "no tensor of the model has changed"]),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_refused_load_leaves_what_was_saved(why: str, tmp_path: Path) -> None:
    model, lines = REFUSED[why]
    cut_short(saver(tmp_path, **EXACT), after=8)
    before = load(tmp_path)
    with pytest.raises(ModelMismatchError) as error:
        fit(saver(tmp_path, save_on_exception=True), model=model())
    assert all(line in str(error.value) for line in lines), error.value
    assert_same(load(tmp_path), before)
    assert min(fit(saver(tmp_path), model=TinyModel()).live) == 9


@pytest.mark.parametrize("why", REFUSED)
def test_a_refused_load_of_a_loop_leaves_what_was_saved(why: str, tmp_path: Path) -> None:
    model, lines = REFUSED[why]
    train(TinyModel(), tmp_path, after=5)
    before = load(tmp_path)
    wrong = model()
    scar = SCARLoop(tmp_path, {"model": wrong, "other": nn.Linear(1, 1), "optimizer": wrong.configure_optimizers()})
    with pytest.raises(ModelMismatchError) as error, scar:
        scar.resume()
    assert all(line.replace(": ", ": model.", 1) in str(error.value) for line in lines), error.value
    assert_same(load(tmp_path), before)
    assert_same(train(TinyModel(), tmp_path), train(TinyModel(), tmp_path / "whole"))


# -- what fits -----------------------------------------------------------------------------------------------------


def state_of(optimizer: Optimizer, parameter: Any) -> dict[str, Any]:
    return optimizer.state.get(parameter, {})


def in_a_trainer(model: TinyModel, dirpath: Path) -> Optimizer:
    """Resumes and stops there."""
    with pytest.raises(Stopped):
        fit(saver(dirpath, strict=False), StopAfter(0), model=model)
    return model.trainer.optimizers[0]


def in_a_loop(model: TinyModel, dirpath: Path) -> Optimizer:
    optimizer: Optimizer = model.configure_optimizers()
    state = {"model": model, "other": nn.Linear(1, 1), "optimizer": optimizer}
    with SCARLoop(dirpath, state, every_n_steps=1, strict=False, save_on_exception=False) as scar:
        assert scar.resume() == 5
    return optimizer


@pytest.fixture(params=["Trainer", "loop"])
def front_door(request: Any) -> Any:
    """What trains and saves a model, and what then loads what fits into another one."""
    if request.param == "loop":
        return lambda model, path: train(model, path, after=5), in_a_loop
    return lambda model, path: cut_short(saver(path, **EXACT), after=5, model=model), in_a_trainer


@pytest.mark.parametrize("kind", [Adam, partial(SGD, momentum=0.9), Adafactor], ids=["Adam", "SGD", "Adafactor"])
def test_what_fits_is_loaded_with_the_optimizers_state(kind: Any, front_door: Any, tmp_path: Path) -> None:
    save, resume = front_door
    kind = partial(kind, lr=0.01)
    saved = TinyModel(optimizer=kind)
    save(saved, tmp_path)
    disk = load(tmp_path)
    initial = {name: value.clone() for name, value in Deeper(kind).state_dict().items()}
    model = Deeper(kind)
    with pytest.warns(UserWarning, match="lightning-scar") as warned:
        optimizer = resume(model, tmp_path)
    said = "\n".join(str(warning.message) for warning in warned)
    assert "missing: " in said
    assert "tensors were loaded" in said
    assert "the optimizers' state of 2 of 6 parameters was loaded" in said
    names = [name.removeprefix("model.") for name in disk["state_dict"] if "other" not in name]
    states = dict(zip(names, disk["optimizer_states"][0]["state"].values(), strict=True))
    for name, parameter in model.named_parameters():
        if name.startswith("net.0."):
            assert torch.equal(parameter, dict(saved.named_parameters())[name])
            assert_same(state_of(optimizer, parameter), states[name])
        else:
            assert torch.equal(parameter, initial[name])
            assert not state_of(optimizer, parameter)


class RenamedAndDeeper(TinyModel):
    """Renames what it loads, and has a layer more."""

    def __init__(self, optimizer: Any = ADAM) -> None:
        super().__init__(optimizer=optimizer)
        self.body = self.net
        del self.net
        self.first = nn.Linear(8, 8)
        self.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(module: Any, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}net.")]:
            state[name.replace(f"{prefix}net.", f"{prefix}body.")] = state.pop(name)

    def forward(self, x: Any) -> Any:
        return self.body(self.first(x))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([*self.first.parameters(), *self.body.parameters()])


def test_what_is_renamed_and_fits_keeps_the_optimizers_state(front_door: Any, tmp_path: Path) -> None:
    save, resume = front_door
    saved = TinyModel()
    save(saved, tmp_path)
    states = load(tmp_path)["optimizer_states"][0]["state"]
    model = RenamedAndDeeper()
    with pytest.warns(UserWarning, match="the optimizers' state of 4 of 6 parameters was loaded"):
        optimizer = resume(model, tmp_path)
    for number, (parameter, before) in enumerate(zip(model.body.parameters(), saved.parameters(), strict=True)):
        assert torch.equal(parameter, before)
        assert_same(state_of(optimizer, parameter), states[number])


def test_the_numbers_of_what_was_loaded(tmp_path: Path) -> None:
    cut_short(saver(tmp_path, **EXACT), after=5)
    with pytest.warns(UserWarning, match="was written by another model: 2 of the present one's 6 tensors were loaded"):
        in_a_trainer(Deeper(), tmp_path)


def test_other_groups_of_an_optimizer_get_their_parameters_state(front_door: Any, tmp_path: Path) -> None:
    save, resume = front_door
    saved = TinyModel(optimizer=partial(Adam, lr=0.02))
    save(saved, tmp_path)
    states = load(tmp_path)["optimizer_states"][0]["state"]
    model = TwoRates()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        optimizer = resume(model, tmp_path)
    assert not [w for w in warned if "lightning-scar: " in str(w.message)], "all of it fits"
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02], "what was saved holds"
    for name, parameter in model.named_parameters():
        number = [n for n, _ in saved.named_parameters()].index(name)
        assert_same(state_of(optimizer, parameter), states[number])


def test_a_run_goes_on_from_what_fitted(tmp_path: Path) -> None:
    cut_short(saver(tmp_path, **EXACT), after=5)
    with pytest.warns(UserWarning, match="were loaded"):
        model = cut_short(saver(tmp_path, strict=False, **EXACT), after=8, model=Deeper())
    resumed = fit(saver(tmp_path), model=Deeper())
    assert min(model.live) == 6
    assert min(resumed.live) == 9
    assert_blocks_as_lived(tmp_path, model.live | resumed.live)


@pytest.mark.parametrize("model", [WithABody, SaysNothing])
def test_nothing_is_not_what_fits(model: Any, tmp_path: Path) -> None:
    message = r"nothing of .* was loaded: no tensor of the model has changed"
    cut_short(saver(tmp_path / "trainer", **EXACT), after=5)
    with pytest.raises(ModelMismatchError, match=message):
        in_a_trainer(model(), tmp_path / "trainer")
    for wrong in (TinyModel(), model()):
        state = {"model": wrong, "optimizer": wrong.configure_optimizers()}
        scar = SCARLoop(tmp_path / "loop", state, every_n_steps=1, strict=False)
        if type(wrong) is TinyModel:
            scar.resume()
            scar.close()
        else:
            with pytest.raises(ModelMismatchError, match=message):
                scar.resume()
    assert load(tmp_path / "trainer")["global_step"] == 5
    assert load(tmp_path / "loop")["state_dict"].keys() == TinyModel().state_dict().keys()


def test_lost_blocks_of_a_model_that_adapts_get_their_initial_values(tmp_path: Path) -> None:
    saved = Compiled()
    cut_short(saver(tmp_path, block_size=128, refresh=None), after=4, model=saved)
    first, *_ = sorted(tmp_path.rglob("*.safetensors"))
    first.unlink()
    model = NoLongerCompiled()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="from initial values"):
        in_a_trainer(model, tmp_path)
    is_initial = torch.cat([(value == before[name]).flatten() for name, value in model.state_dict().items()])
    assert is_initial.any()
    assert not is_initial.all()
