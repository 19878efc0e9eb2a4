"""Hosts and supervisors that are lost in the middle of a training, with all that runs on them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same
from hosts import Host, folder_hosts, have_namespaces, namespace_hosts
from scar_ddp_runs import DOORS, REFERENCE, Fault, Training, assert_done, train, world_sizes

# Three ranks start on two cores, one after the other.
pytestmark = pytest.mark.timeout(300)

MEMORY: dict[str, Any] = {"every_n_train_steps": 1, "fraction": 1.0, "memory": True, "durable_every_n_saves": 1000}


@pytest.fixture
def hosts(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[list[Host]]:
    """So many as the test asks for."""
    count = request.param
    with namespace_hosts(count) if have_namespaces() else folder_hosts(count, tmp_path) as hosts:
        yield hosts


@pytest.mark.parametrize("door", [DOORS[0], *(pytest.param(door, marks=pytest.mark.slow) for door in DOORS[1:])])
@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_the_others_go_on_without_a_host_until_another_one_is_in_its_place(
    tmp_path: Path, hosts: list[Host], door: str
) -> None:
    fault: Fault = ("training_step", 8, 1, "lose the host")
    training = train(tmp_path / "job", fault, nodes=2, hosts=hosts, door=door, scar=MEMORY, **REFERENCE)
    assert_done(training, steps=36)
    assert world_sizes(training)[8] == 1
    assert [outage["reason"] for outage in training.outages(0)] == ["node 1 was lost"]
    for line in (
        "node 1 was lost; the job goes on without it.",
        "node 1 was lost in step 9; 1 of 2 workers go on",
        "is back",
    ):
        assert line in training.console
    assert not [path for host in hosts for path in host.left_in_memory()]


@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_a_supervisor_that_is_killed_is_started_again_and_finds_its_hosts_memory(
    tmp_path: Path, hosts: list[Host]
) -> None:
    fault: Fault = ("training_step", 8, 1, "lose the supervisor")
    training = train(tmp_path / "job", fault, nodes=2, hosts=hosts, scar=MEMORY, **REFERENCE)
    assert_done(training, steps=36)
    assert [outage["reason"] for outage in training.outages(0)] == ["node 1 was lost"]
    assert not [path for host in hosts for path in host.left_in_memory()]


#: Each rank has a part of the optimizer's state. Every fourth save goes to storage; all are copied at once.
SHARDED: dict[str, Any] = {
    "model": {"sharded": True},
    "scar": {**MEMORY, "durable_every_n_saves": 4, "staging": "eager"},
}


def plan(training: Training) -> str:
    """What was said of where the optimizer's states came from, the last time."""
    return training.console.rsplit("Optimizer states from the running checkpoint", 1)[1].split("\n")[0]


@pytest.mark.parametrize("hosts", [2, pytest.param(3, marks=pytest.mark.slow)], indirect=True)
def test_a_lost_hosts_shard_comes_out_of_its_neighbours_memory(tmp_path: Path, hosts: list[Host]) -> None:
    ranks = len(hosts)
    fault: Fault = ("training_step", 7, 1, "lose the host")
    training = train(tmp_path / "job", fault, ranks=ranks, nodes=ranks, hosts=hosts, **SHARDED)
    assert training.code == 0, training.console
    assert "memory" in plan(training)
    # The disk alone has of the lost rank what was saved at step 4.
    assert "last saved at step" not in plan(training)
    assert "older versions" not in plan(training)
    # Nobody was started in vain.
    assert "exited with code" not in training.console
    undisturbed = train(tmp_path / "undisturbed", ranks=ranks, **SHARDED)
    for rank in range(ranks):
        mine, expected = training.results[rank], undisturbed.results[rank]
        assert mine["global_step"] == expected["global_step"]
        if ranks == 2:
            assert_same(mine["state"], expected["state"], f"rank {rank}")
        # Three numbers have several sums: a group's first step reduces them in another order than later ones.
        torch.testing.assert_close(mine["state"], expected["state"], rtol=1e-5, atol=1e-6)
    assert not [path for host in hosts for path in host.left_in_memory()]


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [3], indirect=True)
def test_where_two_neighbours_are_lost_at_once_a_shard_comes_from_storage(tmp_path: Path, hosts: list[Host]) -> None:
    faults: list[Fault] = [("training_step", 7, rank, "lose the host") for rank in (1, 2)]
    training = train(tmp_path / "job", *faults, ranks=3, nodes=3, hosts=hosts, **SHARDED)
    assert training.code == 0, training.console
    # That of rank 2 was copied to host 0, that of rank 1 to host 2 only.
    assert "memory" in plan(training)
    assert "from newest versions" in plan(training)
    assert "Rank 1 last saved at step 4" in plan(training)
    assert "Rank 2 last saved" not in plan(training)
    assert {result["global_step"] for result in training.results.values()} == {16}
    assert not [path for host in hosts for path in host.left_in_memory()]


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_without_node_0_the_job_ends_and_goes_on_from_its_neighbours_memory(tmp_path: Path, hosts: list[Host]) -> None:
    fault: Fault = ("training_step", 7, 0, "lose the host")
    options = {"nodes": 2, "hosts": hosts, "scar": MEMORY, **REFERENCE}
    training = train(tmp_path / "job", fault, **options)
    assert training.code != 0
    assert "the supervisor on node 0 is gone" in training.console
    training = train(tmp_path / "job", fault, **options)
    assert training.code == 0, training.console
    resumed = training.console.split("Resuming from the running checkpoint")[1].split("\n")[0]
    assert "from a neighbour's memory" in resumed
    # What the other host's rank was left with when it noticed, it has brought to storage.
    assert "older versions" not in resumed
    assert {result["global_step"] for result in training.results.values()} == {36}
    assert not [path for host in hosts for path in host.left_in_memory()]
