"""What ``torch.compile`` has made is not made again when the group changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cover_runs import TOLERANCE, difference, samples, train_double
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.compile import from_compiled
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_scar import SCARDDPStrategy
from lightning_scar.continuation.wrappers import Wrappers
from lightning_scar.core.private import has_compiled


def test_it_is_known_whether_anything_was_compiled() -> None:
    assert run_ranks(compile_something, 1) == [(False, True)]


def compile_something(rank: int) -> tuple[bool, bool]:
    before = has_compiled()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    return before, has_compiled()


@pytest.mark.parametrize(
    ("door", "what"),
    [("Trainer", "net"), pytest.param("Accelerate", "net", marks=pytest.mark.slow), ("Accelerate", "model")],
)
def test_survivors_compile_nothing_in_an_outage(tmp_path: Path, door: str, what: str) -> None:
    options: dict[str, Any] = {"door": door, "model": {"compiled": what}}
    training = train_double(tmp_path / "disturbed", ("training_step", 4, 1, "kill"), **options)
    expected = train_double(tmp_path / "undisturbed", **options)
    assert "would compile the training step again" in training.console
    assert training.outages(0)[0]["covered_batches"] > 0
    compiled = {step["graphs"] for step in training.steps if step["slot"] != 1}
    assert compiled == {step["graphs"] for step in expected.steps}, training.console
    assert len(compiled) == 1
    assert min(compiled) > 0
    assert samples(training) == samples(expected), training.console
    assert difference(expected, training) <= TOLERANCE, training.console


def unwrapped_and_wrapped(rank: int) -> list[bool]:
    """Whether the model of a strategy is compiled: at first, without a group, and with another one."""
    model = from_compiled(torch.compile(BoringModel(), backend="eager"))
    strategy = SCARDDPStrategy(parallel_devices=[torch.device("cpu")])
    strategy.connect(model)
    strategy._lightning_module = model
    compiled, found = vars(model)["forward"], []
    strategy.configure_ddp()
    for change in (lambda: None, strategy.unwrap, strategy.wrap):
        change()
        strategy.training_step(torch.ones(1, 32), 0)
        found.append(vars(model)["forward"] is compiled)
    return found


def test_a_compiled_module_stays_compiled() -> None:
    assert run_ranks(unwrapped_and_wrapped, 1) == [[True, True, True]]


def wrapped_again(rank: int) -> tuple[list[float], list[float], int, Any]:
    """What a wrapper has been made with is still there, and it is the same object. Returns gradients, and options."""
    options = {"gradient_as_bucket_view": True, "find_unused_parameters": True, "bucket_cap_mb": None}
    ddp = DistributedDataParallel(nn.Linear(2, 1, bias=False), **options)  # type: ignore[arg-type]
    calls: list[int] = []
    ddp.register_comm_hook(calls, noted)
    ddp(torch.ones(1, 2)).sum().backward()
    ddp.zero_grad()
    before = vars(ddp).copy()
    wrappers = Wrappers([ddp])
    wrappers.unwrap()
    ddp(torch.ones(1, 2) * rank).sum().backward()
    (own,) = ddp.module.weight.grad.tolist()
    ddp.zero_grad()
    wrappers.wrap()
    ddp(torch.ones(1, 2) * rank).sum().backward()
    made_anew = ("reducer", "logger", "process_group")
    changed = [name for name in before if name not in made_anew and before[name] != vars(ddp)[name]]
    return own, ddp.module.weight.grad[0].tolist(), len(calls), changed


def noted(calls: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    calls.append(1)
    work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def test_a_wrapper_keeps_its_options_and_hooks() -> None:
    ends = run_ranks(wrapped_again, 2)
    assert [own for own, *_ in ends] == [[0.0, 0.0], [1.0, 1.0]]
    assert [reduced for _, reduced, *_ in ends] == [[0.5, 0.5], [0.5, 0.5]]
    assert [calls for *_, calls, _ in ends] == [2, 2]
    assert [changed for *_, changed in ends] == [[], []]


def of_a_part(rank: int) -> str:
    groups = [dist.new_group([each]) for each in range(2)]
    ddp = DistributedDataParallel(nn.Linear(2, 1), process_group=groups[rank])
    with pytest.raises(ValueError, match="1 of 2 workers in a group of its own") as error:
        Wrappers([ddp])
    return str(error.value)


def test_a_wrapper_of_a_part_of_the_workers_is_refused() -> None:
    assert all("omit process_group" in text for text in run_ranks(of_a_part, 2))
