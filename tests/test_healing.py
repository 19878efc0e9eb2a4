"""Blocks of a live run that turn NaN, and are restored."""

import math
from pathlib import Path
from typing import Any, Literal

import ddp_runs
import lightning.pytorch as pl
import loop_runs
import pytest
import torch
from ddp_runs import SMALL, Healed, Patient, Poison, Run
from helpers import TinyModel, assert_same, cut_short, fit, loader, saver
from lightning.pytorch.callbacks import Callback
from ranks import run_ranks
from torch import Tensor

from lightning_scar import SCARCheckpoint, load
from lightning_scar.core.recovery import IncompleteError

HEALING = SMALL | {"heal_non_finite": True, "full_every_n_saves": None}


def is_finite(checkpoint: dict[str, Any]) -> bool:
    tensors = [*checkpoint["state_dict"].values()]
    tensors += [value for state in checkpoint["optimizer_states"][0]["state"].values() for value in state.values()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def healed(runs: list[Run]) -> list[str]:
    return [text for text in runs[0].warned if "healed" in text]


# -- one process ---------------------------------------------------------------------------------------------------


class Calls(Callback):
    """Heals by hand at a step."""

    def __init__(self, scar: SCARCheckpoint, step: int) -> None:
        self.scar, self.step = scar, step
        self.answers: list[bool] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step >= self.step:
            self.answers.append(self.scar.heal(trainer))


def weight_and_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    return {"param": checkpoint["state_dict"]["net.0.weight"]} | checkpoint["optimizer_states"][0]["state"][0]


@pytest.mark.parametrize("refresh", ["auto", None])
@pytest.mark.parametrize("slot", ["param", "exp_avg", "exp_avg_sq"])
def test_blocks_that_turn_nan_are_restored_alone(
    tmp_path: Path, slot: str, refresh: Literal["auto"] | None, memory_url: str
) -> None:
    notes = ddp_runs.Notes()
    options = HEALING | {"refresh": refresh}
    scar = saver(tmp_path, **options)
    with pytest.warns(UserWarning, match=r"NaN or Inf at step 6, healed: .* from survivors, .* newest versions"):
        model = fit(scar, Patient(), Healed(), Poison(6, slot=slot), logger=notes)
    assert scar.stats.heals == 1
    assert [row["scar/heals"] for row in notes.rows][-1] == 1
    assert scar.stats.non_finite_blocks == 0
    for step in range(1, 17):
        assert is_finite(model.live[step]), step
    cut_short(saver(memory_url, **options), Patient(), after=5)
    on_disk, healed = weight_and_state(load(memory_url)), weight_and_state(model.live[6])
    lived = [weight_and_state(model.live[step]) for step in range(1, 7)]
    # Two rows a block: two blocks are what a crash would have gone on with; the others moved as in any step.
    for name in ("param", "exp_avg", "exp_avg_sq"):
        for block in (slice(2, 4), slice(4, 6)):
            assert torch.equal(healed[name][block], on_disk[name][block])
            if refresh is None:
                assert any(torch.equal(healed[name][block], earlier[name][block]) for earlier in lived[:-1])
        assert not (healed[name][6:] == lived[-2][name][6:]).all(1).any()
    assert_same(load(tmp_path)["state_dict"], model.live[16]["state_dict"])


def test_infinity_counts_too(tmp_path: Path) -> None:
    class Grows(Poison):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            if trainer.global_step == 6:
                next(pl_module.parameters()).data[3, 3] = -torch.inf

    scar = saver(tmp_path, **HEALING)
    with pytest.warns(UserWarning, match="healed"):
        model = fit(scar, Grows())
    assert is_finite(model.final)


def test_only_saves_look_for_it(tmp_path: Path) -> None:
    scar = saver(tmp_path, **HEALING | {"every_n_train_steps": 4})
    with pytest.warns(UserWarning, match="NaN or Inf at step 8, healed"):
        model = fit(scar, Healed(), Poison(6))
    assert not is_finite(model.live[6])
    assert is_finite(model.live[8])
    assert is_finite(model.final)


def test_it_is_off_by_default(tmp_path: Path) -> None:
    scar = saver(tmp_path, **SMALL)
    with pytest.warns(UserWarning, match="hold NaN or Inf"):
        model = fit(scar, Poison(6))
    assert scar.stats.heals == 0
    assert not is_finite(model.final)
    assert all(bool(values.isfinite().all()) for values in load(tmp_path)["state_dict"].values())


def test_nan_again_and_again_is_an_error(tmp_path: Path) -> None:
    scar = saver(tmp_path, **HEALING | {"max_heals": 2})
    model = TinyModel()
    with (
        pytest.warns(UserWarning, match="healed"),
        pytest.raises(RuntimeError, match=r"again after 2 heals \(max_heals\); find the cause .* in .*") as error,
    ):
        fit(scar, Poison(4, 6, 9), model=model)
    assert str(tmp_path) in str(error.value)
    assert is_finite(load(tmp_path))
    assert max(model.live) == 9


def test_nan_before_the_first_save_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match="no intact version"):
        fit(saver(tmp_path, **HEALING), Poison(1))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_heal_can_be_called_by_hand(tmp_path: Path) -> None:
    scar = saver(tmp_path, **SMALL | {"every_n_train_steps": 3})
    calls = Calls(scar, step=8)
    with pytest.warns(UserWarning, match="healed"):
        model = fit(scar, Poison(8), calls)
    assert calls.answers[:2] == [True, False]
    assert not any(calls.answers[1:])
    assert is_finite(model.live[8])
    assert is_finite(model.final)
    with pytest.raises(AssertionError, match=r"call heal\(\) during fit"):
        scar.heal(model.trainer)


def test_a_healed_run_resumes(tmp_path: Path) -> None:
    scar = saver(tmp_path, **HEALING)
    with pytest.warns(UserWarning, match="healed"), pytest.raises(ddp_runs.Stopped):
        fit(scar, Poison(6), ddp_runs.StopAfter(6))
    with pytest.warns(UserWarning, match="NaN or Inf at step 9, healed"):
        model = fit(saver(tmp_path, **HEALING), Poison(9), data=loader())
    assert min(model.live) == 7
    assert is_finite(model.final)


# -- several -------------------------------------------------------------------------------------------------------

ALL, ONE = (0, 1), (1,)
CASES: dict[str, dict[str, Any]] = {
    "all ranks": {"poison": Poison(6, ranks=ALL)},
    "one rank": {"poison": Poison(6, ranks=ONE)},
    "the first rank": {"poison": Poison(6, ranks=(0,))},
    "the state of one": {"poison": Poison(6, ranks=ONE, slot="exp_avg")},
    "the state of all": {"poison": Poison(6, ranks=ALL, slot="exp_avg_sq")},
    "ZeRO": {"poison": Poison(6, ranks=ALL), "model": "ZeRO"},
    "ZeRO on one rank": {"poison": Poison(6, ranks=ONE), "model": "ZeRO"},
}


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Run]]:
    calls = []
    for options in CASES.values():
        rest = {name: value for name, value in options.items() if name != "poison"}
        folder = tmp_path_factory.mktemp("healing")
        calls.append(((folder, Patient(), Healed(), options["poison"]), {"scar": HEALING, "max_epochs": 1, **rest}))
    by_rank = run_ranks(ddp_runs.train_in_turn, 2, *calls)
    return {case: list(runs) for case, runs in zip(CASES, zip(*by_rank, strict=True), strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_heal_at_the_same_step(case: str, on_two_ranks: dict[str, list[Run]]) -> None:
    runs = on_two_ranks[case]
    for run in runs:
        assert run.error is None, run.error
        assert run.stats["heals"] == 1
        assert len(run.seen) == 8
        for step in range(1, 9):
            assert is_finite(run.live[step]), step
            assert_same(run.live[step]["state_dict"], runs[0].live[step]["state_dict"], f"step {step}")
            if "ZeRO" not in case:
                assert_same(run.live[step]["optimizer_states"], runs[0].live[step]["optimizer_states"])
        heals = [row["scar/heals"] for row in run.logged]
        assert heals == sorted(heals)
        assert heals[-1] == 1
        assert all(math.isfinite(row["scar/distance"]) for row in run.logged)
    (told,) = healed(runs)
    assert "NaN or Inf at step 6" in told
    assert "from survivors" in told
    # What one rank still has need not come from disk, be it a moment older.
    assert ("newest versions" in told) == (case in ("all ranks", "the state of all", "ZeRO"))


def test_what_one_rank_lost_comes_back_as_the_other_has_it(on_two_ranks: dict[str, list[Run]]) -> None:
    for case in ("one rank", "the first rank", "the state of one"):
        first, second = on_two_ranks[case]
        weight = first.live[6]["state_dict"]["net.0.weight"]
        earlier = first.live[5]["state_dict"]["net.0.weight"]
        assert not (weight == earlier).all(1).any(), "every row has moved since, so none is older"
        assert_same(first.live[6], {**second.live[6], "callbacks": first.live[6]["callbacks"]} | loops(first, 6))


def loops(run: Run, step: int) -> dict[str, Any]:
    return {"loops": run.live[step]["loops"]}


def test_too_many_heals_are_an_error_on_all_ranks(tmp_path: Path) -> None:
    once = HEALING | {"max_heals": 1}
    runs = run_ranks(ddp_runs.train, 2, tmp_path, Patient(), Poison(4, 6, ranks=ONE), scar=once, max_epochs=1)
    for run in runs:
        assert run.error is not None
        assert run.error[0] == "RuntimeError"
        assert "max_heals" in run.error[1]
    assert is_finite(load(tmp_path))


def test_nan_before_the_first_save_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    runs = run_ranks(ddp_runs.train, 2, tmp_path, Poison(1, ranks=ALL), scar=HEALING)
    assert [run.error and run.error[0] for run in runs] == ["IncompleteError"] * 2


# -- in a loop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loop_is_healed(tmp_path: Path, world_size: int) -> None:
    options = {"heal_non_finite": True, "fraction": 0.3, "block_size": 64}
    runs = run_ranks(loop_runs.train, world_size, tmp_path, way="poisoned", scar=options)
    for rank, run in enumerate(runs):
        assert run.error is None
        assert run.stats["heals"] == 1
        assert is_finite(run.final)
        assert [text for text in run.warned if "healed" in text][:1] == run.warned[: int(rank == 0)]
    assert_same(runs[0].final["state_dict"], runs[-1].final["state_dict"])
    assert is_finite(load(tmp_path))


def test_a_loop_is_left_as_it_is_without_healing(tmp_path: Path) -> None:
    (run,) = run_ranks(loop_runs.train, 1, tmp_path, way="poisoned")
    assert run.stats["heals"] == 0
    assert not is_finite(run.final)
    assert is_finite(load(tmp_path))
