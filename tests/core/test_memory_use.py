"""What the user is told of the memory that saves take, and that they take no more."""

import io
import os
import re
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from memory_helpers import MEMORY, hosts_of, wait_for_copies
from ranks import run_ranks
from shared_helpers import make_training, opened, quietly

from lightning_scar.storage.host_memory import VARIABLE

pytestmark = pytest.mark.usefixtures("host")

#: A header for each of the tiny blocks of these tests, which nobody counts in megabytes of a real one.
HEADERS = 1.5


def used(host: Path) -> int:
    return sum(path.stat().st_size for path in host.glob("*/*/*/*/*"))


def saves(rank: int, host: Path, url: str, resume: bool = False) -> tuple[str, int]:
    """What is told, and how many bytes lie in the host's memory in the end."""
    os.environ[VARIABLE] = str(host)
    training = make_training()
    with redirect_stderr(io.StringIO()) as said, opened(url, fraction=0.3, **MEMORY) as running:
        if resume:
            training.load(quietly(running)[0])
        for _ in range(9):
            training.step()
            training.save(running)
            running.flush()
            if resume:
                break
        wait_for_copies(running)
        running.ranks.gather(None)
        found = used(host)
        running.ranks.gather(None)
        return said.getvalue(), found


def saves_on_hosts(rank: int, hosts: list[Path], url: str) -> tuple[str, int]:
    return saves(rank, hosts[rank], url)


def stated(said: str) -> float:
    """Bytes at most."""
    (number, unit), *others = re.findall(r"at most ([\d.]+) (\w+) per host", said)
    assert not others
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit]


@pytest.mark.parametrize("n", [1, 2])
def test_what_is_stated_once_holds_for_all_ranks_of_a_host(n: int, url: str, host: Path) -> None:
    (said, found), *others = run_ranks(saves, n, host, url)
    assert stated(said) < found * 2
    assert found < stated(said) * HEADERS
    assert f"{n} ranks" in said or n == 1
    assert all(not other for other, _ in others)


def test_copies_for_other_hosts_are_stated_too(url: str, host: Path) -> None:
    (said, found), (other, _) = run_ranks(saves_on_hosts, 2, hosts_of(host, 2), url)
    assert "and 1 copies for other hosts" in said
    assert stated(said) < found * 2
    assert found < stated(said) * HEADERS
    assert not other
