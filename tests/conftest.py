"""Fixtures for all tests. That this file is here also lets tests say ``from helpers import ...``."""

import logging
import os
import secrets
import signal
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import fsspec
import pytest
import s3fs
import torch.distributed as dist
from hypothesis import settings
from prepared import PreparedPopen

from lightning_scar.elastic.supervisor.token import VARIABLE as TOKEN
from lightning_scar.storage.host_memory import VARIABLE

# Other processes share the machine: how long an example takes says nothing.
settings.register_profile("all", deadline=None)
settings.register_profile("some", settings.get_profile("all"), max_examples=25)
settings.load_profile("some")

# Jobs on several nodes would make a file for it in the user's home directory.
os.environ[TOKEN] = secrets.token_hex()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # The suite was started in the background, but its programs are sent Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


#: The jobs of these modules run on the backend that fails as NCCL does, too: chosen ones always, all if slow tests run.
ON_BOTH_BACKENDS = ("test_scar_ddp", "test_cover")
CHOSEN = (
    "others_go_on_as_a_smaller_group[nccl_like-Accelerate]",
    "one_of_three_is_left[nccl_like-Trainer]",
    "weights_wait_for_the_replacement[nccl_like-Accelerate]",
    "stale_gradients_are_applied_when_the_replacement_is_there[nccl_like-Trainer-mean]",
    "synchronising_micro_batch_is_repeated_with_the_gradients_of_those_before[nccl_like-Trainer]",
    "a_worker_that_hangs_is_replaced[nccl_like-the strategy's argument-Trainer]",
    "a_batch_that_makes_no_step[nccl_like-Trainer-True]",
    "the_running_checkpoint_goes_on_in_a_replacement[nccl_like-Trainer]",
    "a_failure_outside_of_steps_costs_nothing_but_time[nccl_like-killed, of rank 1-Trainer]",
    "ends_as_without_a_death_in_its_validation[nccl_like-each epoch-in the first validation]",
    "kills_change_nothing[nccl_like-Trainer-3-AdamW]",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.startswith(ON_BOTH_BACKENDS):
        metafunc.fixturenames.append("backend")
        metafunc.parametrize("backend", ["gloo", "nccl_like"], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    sampled = []
    for item in items:
        call = getattr(item, "callspec", None)
        if call is not None and call.params.get("backend") == "nccl_like":
            if not item.name.endswith(CHOSEN):
                item.add_marker(pytest.mark.slow)
        elif item.get_closest_marker("sampled") and not item.get_closest_marker("slow"):
            sampled.append(item)
    leave_to_test_all(sampled)


def leave_to_test_all(sampled: Iterable[pytest.Item]) -> None:
    """Make all but a few cases of each test slow, and not always those with the same of their parameters."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in sampled:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for items in cases.values():
        (every,) = items[0].get_closest_marker("sampled").args  # type: ignore[union-attr]
        for i, item in enumerate(items):
            if i % every != i // every % every:
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the process groups of all jobs in the test."""
    monkeypatch.setenv("SCAR_TESTS_BACKEND", request.param)


#: What a Trainer leaves in the environment, such as ports and seeds, and other tests would take over.
LEFT = (
    *("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"),
    *("PL_GLOBAL_SEED", "PL_SEED_WORKERS"),
)


@pytest.fixture(autouse=True)
def nothing_stays_in_this_process() -> Iterator[None]:
    """Neither what a Trainer leaves in the environment nor its process group."""
    before = {name: os.environ.get(name) for name in LEFT}
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def no_program_outlives_its_test() -> Iterator[None]:
    """Also where a test fails."""
    yield
    PreparedPopen.end_all()


@pytest.fixture
def memory_url() -> Iterator[str]:
    """A directory of its own on a file system in memory."""
    name = f"/test-{uuid.uuid4().hex}"
    yield f"memory:/{name}"
    files = fsspec.filesystem("memory")
    if files.exists(name):
        files.rm(name, recursive=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of a real S3 server on the loopback. The environment leads s3fs to it, in child processes too."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_CONFIG_FILE", "/dev/null")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        patch.setenv("NO_PROXY", host)
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_server: str) -> str:
    """The URL of an empty bucket."""
    bucket = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for the memory of a host."""
    folder = tmp_path / "host"
    folder.mkdir()
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "scar")
