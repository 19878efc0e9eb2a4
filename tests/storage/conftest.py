"""Places to store things in, and processes to kill."""

import os
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from prepared import multiprocessing_context
from toy_blocks import Spawn, in_environment


@pytest.fixture
def file_url(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture(params=["file", "memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    """A folder that does not exist yet, on each file system."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_url')}/store"
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found


@pytest.fixture(params=["file", "s3"])
def shared_url(request: pytest.FixtureRequest) -> str:
    """A folder that other processes see too."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_url')}/store"
    return str(request.getfixturevalue("file_url"))


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts ``function(*arguments)`` in a process of its own, which does not outlive the test."""
    context = multiprocessing_context()
    processes: list[BaseProcess] = []

    def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
        process = context.Process(target=in_environment, args=(dict(os.environ), function, *arguments))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The folder that is served."""
    folder = tmp_path / "there"
    folder.mkdir()
    return folder
