"""Another host of the network tries every port of a job on two hosts."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from elastic_helpers import PLAIN, command, ours, script, wait_for
from hosts import Host, have_namespaces, namespace_hosts

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not have_namespaces(), reason="no namespaces")]

#: It gives an order as a member of the job would, and then says what nobody says.
STRANGER = """
import os, signal, socket, sys, threading
from contextlib import suppress
from datetime import timedelta
from torch.distributed import TCPStore
from lightning_scar.elastic.protocol.log import Events
from lightning_scar.elastic.protocol.messages import StopAsked

def order(host, port):
    with suppress(RuntimeError):
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=1))
        Events(store).append(StopAsked(signal.SIGTERM, node=0))
        print("a stranger got in at", host, port, flush=True)

for address in sys.argv[1:]:
    host, port = address.split(":")
    # Some never answer.
    thread = threading.Thread(target=order, args=(host, int(port)), daemon=True)
    thread.start()
    thread.join(3)
    for said in (b"", b"x" * 200, bytes(200)):
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1) as connection:
            connection.settimeout(0.2)
            connection.sendall(said)
            connection.recv(1000)
print("tried", *sys.argv[1:], flush=True)
os._exit(0)
"""


def listeners(host: Host) -> list[tuple[str, int]]:
    """Which addresses and ports somebody listens at."""
    enter = ["nsenter", "-t", str(host._first), "--net", "ss", "-ltnH"]  # type: ignore[attr-defined]
    lines = subprocess.run(enter, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [line.split()[3].rpartition(":") for line in lines]
    return [(address.strip("[]"), int(port)) for address, _, port in found]


def test_a_stranger_finds_the_gate_and_is_turned_away(tmp_path: Path) -> None:
    plain, stranger = script(tmp_path, PLAIN), tmp_path / "stranger.py"
    stranger.write_text(STRANGER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    names = ["first", "other", "stranger"]
    with namespace_hosts(3) as hosts, ExitStack() as stack:
        consoles = [stack.enter_context((tmp_path / name).open("w")) for name in names]
        endpoint = f"{hosts[0].address}:29500"
        job = []
        for node in (0, 1):
            options = ["--nnodes", "2", "--node-rank", str(node), "--rdzv-endpoint", endpoint]
            words = command(*options, plain, tmp_path, "wait")
            job.append(hosts[node].popen(words, environment, tmp_path, consoles[node]))
        wait_for(tmp_path / "step0", tmp_path / "step1", timeout=60)
        found = [listeners(host) for host in hosts[:2]]
        addresses = [f"{host.address}:{port}" for host, own in zip(hosts[:2], found, strict=True) for _, port in own]
        words = [sys.executable, str(stranger), *addresses]
        assert hosts[2].popen(words, environment, tmp_path, consoles[2]).wait(100) == 0
        (tmp_path / "go").touch()
        codes = [process.wait(60) for process in job]
    first, other, tried = ((tmp_path / name).read_text() for name in names)
    assert codes == [0, 0], first + other
    assert f"tried {' '.join(addresses)}\n" in tried
    assert "got in" not in tried
    assert ours(first + other) == [f"{hosts[2].address} does not know this job's token, and was turned away"]
    # Besides the gate only gloo listens to other hosts.
    open_to_others = [{address for address, _ in own} - {"127.0.0.1"} for own in found]
    assert open_to_others == [{"*", hosts[0].address}, {hosts[1].address}]
    assert [port for address, port in found[0] if address == "*"] == [29500]
