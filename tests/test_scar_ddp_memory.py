"""Memory and the copies of it, in jobs of two nodes that each have a memory of their own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same
from hosts import Host, folder_hosts
from scar_ddp_runs import REFERENCE, Fault, assert_done, train

from lightning_scar.core.restoration import load

SCAR: dict[str, Any] = {
    "every_n_train_steps": 1,
    "fraction": 1.0,
    "memory": True,
    "durable_every_n_saves": 100,
}


def left_behind(hosts: list[Host]) -> list[str]:
    return [path for host in hosts for path in host.left_in_memory()]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    with folder_hosts(2, tmp_path) as hosts:
        yield hosts


@pytest.mark.parametrize("door", ["Trainer", "Accelerate"])
def test_a_replacement_goes_on_with_the_memory_of_its_host(tmp_path: Path, hosts: list[Host], door: str) -> None:
    faults: list[Fault] = [("training_step", 15, 1, "kill"), ("training_step", 25, 0, "kill")]
    wait = {"on_failure": "wait"}
    training = train(tmp_path / "job", *faults, nodes=2, hosts=hosts, strategy=wait, scar=SCAR, door=door, **REFERENCE)
    assert_done(training, steps=36)
    assert_same(load(tmp_path / "job" / "scar")["state_dict"], training.state["state_dict"])
    assert not left_behind(hosts), training.console


@pytest.mark.parametrize("lost", [0, 1])
def test_a_job_goes_on_from_what_the_neighbour_of_a_lost_host_has(tmp_path: Path, hosts: list[Host], lost: int) -> None:
    folder = tmp_path / "job"
    faults: list[Fault] = [("training_step", 15, 0, "kill"), ("training_step", 15, 1, "kill")]
    options = {"nodes": 2, "hosts": hosts, "scar": SCAR, **REFERENCE}
    first = train(folder, *faults, run=("--max-restarts", "0"), **options)
    assert first.code != 0
    assert left_behind(hosts)
    hosts[lost].lose()
    hosts[lost].boot()
    training = train(folder, *faults, **options)
    assert training.code == 0, training.console
    assert "memory" in training.console.split("Resuming from the running checkpoint")[1]
    # The copy may lag a save behind, but storage has the first one only.
    assert "newest versions" not in training.console
    assert {result["global_step"] for result in training.results.values()} == {36}
    assert not left_behind(hosts), training.console
