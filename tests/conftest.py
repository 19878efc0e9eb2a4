"""Fixtures for all tests. That this file is here also lets tests say ``from helpers import ...``."""

import logging
import os
import secrets
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import s3fs
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
