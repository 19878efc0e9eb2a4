"""Several nodes, on the loopback."""

import signal
import subprocess
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from elastic_helpers import PLAIN, SLEEPER, assert_gone, ours, run, running, script, wait_for
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.utils.distributed import get_free_port

from lightning_scar.elastic.protocol.log import Events
from lightning_scar.elastic.protocol.messages import StopAsked
from lightning_scar.elastic.supervisor import admission, nodes
from lightning_scar.elastic.supervisor.token import VARIABLE as TOKEN


def options(node: int, port: int) -> list[str]:
    return ["--nnodes", "2", "--node-rank", str(node), "--rdzv-endpoint", f"127.0.0.1:{port}"]


def test_two_nodes_start_again_together(tmp_path: Path) -> None:
    path, port = script(tmp_path, PLAIN), get_free_port()
    with running(*options(1, port), path, tmp_path, "kill") as other:
        done = run(*options(0, port), path, tmp_path, "kill")
        out, _ = other.communicate(timeout=30)
    assert (done.returncode, other.returncode) == (0, 0), done.stderr
    assert (done.stdout, out) == ("rank 0 is done\n", "rank 1 is done\n")
    assert ours(done.stderr) == ["rank 1 was killed by SIGKILL; starting all workers again"]


def test_a_node_ends_when_node_0_is_gone(tmp_path: Path) -> None:
    path, port = script(tmp_path, SLEEPER), get_free_port()
    with (
        running(*options(0, port), path, tmp_path, "sleep") as first,
        running(*options(1, port), path, tmp_path, "sleep") as other,
    ):
        [pid] = wait_for(tmp_path / "pid1")
        first.kill()
        _, err = other.communicate(timeout=30)
    assert other.returncode == 1
    assert "node 0 is gone" in err
    assert_gone(pid)


def test_a_failure_ends_all_nodes(tmp_path: Path) -> None:
    path, port = script(tmp_path, SLEEPER), get_free_port()
    with running(*options(1, port), "--max-restarts", "0", path, tmp_path, "fail", "sleep") as other:
        done = run(*options(0, port), "--max-restarts", "0", path, tmp_path, "fail", "sleep")
        _, err = other.communicate(timeout=30)
    assert (done.returncode, other.returncode) == (1, 1)
    assert "rank 1 exited with code 3" in done.stderr
    assert ours(err) == ["the job ended: rank 1 exited with code 3"]


def ask_to_stop(port: int) -> None:
    """As a stranger would who knows the protocol."""
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=1))
    Events(store).append(StopAsked(signal.SIGTERM, node=0))


def test_who_does_not_belong_to_the_job_is_told_so_and_the_job_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, port = script(tmp_path, PLAIN), get_free_port()
    with (
        running(*options(0, port), path, tmp_path, "wait") as first,
        running(*options(1, port), path, tmp_path, "wait") as other,
    ):
        wait_for(tmp_path / "step0", tmp_path / "step1")
        done = run(*options(1, port), "--nproc-per-node", "2", path, tmp_path)
        assert done.returncode == 1
        assert ours(done.stderr) == [
            "--nproc-per-node is 2 on this node and 1 on node 0; give the same on all",
        ]
        with pytest.raises((DistError, RuntimeError)):
            ask_to_stop(port)
        monkeypatch.setenv(TOKEN, "what somebody thinks it is")
        done = run(*options(1, port), path, tmp_path)
        assert done.returncode == 1
        assert ours(done.stderr) == [
            f"what answers at 127.0.0.1:{port} knows another token: give all nodes the same LIGHTNING_SCAR_TOKEN, or "
            "copies of ~/.lightning-scar-token"
        ]
        (tmp_path / "go").touch()
        (out, err), (other_out, _) = first.communicate(timeout=30), other.communicate(timeout=30)
    assert (first.returncode, other.returncode) == (0, 0), err
    assert (out, other_out) == ("rank 0 is done\n", "rank 1 is done\n")
    assert ours(err) == ["127.0.0.1 does not know this job's token, and was turned away"]


LOST = (
    "node 1 was lost; all workers are started again when it is back. Start its supervisor again within 600 s, there or "
    "on another host, with --node-rank 1"
)


def test_plain_workers_start_again_when_a_lost_node_is_back(tmp_path: Path) -> None:
    path, port = script(tmp_path, PLAIN), get_free_port()
    with running(*options(0, port), path, tmp_path, "slow") as first:
        with running(*options(1, port), path, tmp_path, "slow") as other:
            wait_for(tmp_path / "step1")
            other.kill()
        with running(*options(1, port), path, tmp_path, "slow") as next_one:
            out, _ = next_one.communicate(timeout=60)
            _, err = first.communicate(timeout=30)
    assert (first.returncode, next_one.returncode) == (0, 0), err
    assert out == "rank 1 is done\n"
    # A plain worker fails together with its peer, before its node is known to be lost.
    assert ours(err)[-2:] == [LOST, "node 1 is back"]


def test_a_lost_node_ends_the_job_where_nobody_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "SILENCE_SECONDS", 3)
    path, port = script(tmp_path, SLEEPER), get_free_port()

    def lose() -> None:
        with running(*options(1, port), path, tmp_path, "sleep") as other:
            wait_for(tmp_path / "pid0", tmp_path / "pid1")
            other.kill()

    thread = threading.Thread(target=lose)
    thread.start()
    done = run(*options(0, port), "--node-timeout", "1", path, tmp_path, "sleep")
    thread.join()
    assert done.returncode == 1
    assert "the job failed: node 1 was lost and has not come back within 1 s." in done.stderr
    assert_gone(*wait_for(tmp_path / "pid0"))


def test_a_node_that_is_there_is_not_there_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "SILENCE_SECONDS", 1)
    monkeypatch.setattr(admission, "_GRACE_SECONDS", 0)
    path, port = script(tmp_path, SLEEPER), get_free_port()
    with (
        running(*options(0, port), path, tmp_path, "sleep"),
        running(*options(1, port), path, tmp_path, "sleep"),
    ):
        wait_for(tmp_path / "pid1")
        done = run(*options(1, port), path, tmp_path)
    assert done.returncode == 1
    assert ours(done.stderr) == ["another node with --node-rank 1 is running; give each its own"]


def test_a_node_that_was_only_silent_ends_when_it_hears_that_it_counts_as_lost(tmp_path: Path) -> None:
    path, port = script(tmp_path, PLAIN), get_free_port()
    ended: list[tuple[int, list[str]]] = []

    def replace() -> None:
        with running(*options(1, port), path, tmp_path, "slow") as silent:
            wait_for(tmp_path / "step1")
            silent.send_signal(signal.SIGSTOP)
            (tmp_path / "pid1").unlink()
            with running(*options(1, port), path, tmp_path, "slow") as next_one:
                wait_for(tmp_path / "pid1")
                silent.send_signal(signal.SIGCONT)
                for one in (silent, next_one):
                    _, err = one.communicate(timeout=60)
                    ended.append((one.returncode, ours(err)))

    thread = threading.Thread(target=replace)
    thread.start()
    done = run(*options(0, port), path, tmp_path, "slow")
    thread.join()
    assert done.returncode == 0, done.stderr
    assert ours(done.stderr) == [LOST, "node 1 is back"]
    assert ended == [(1, ["the job ended: node 0 has given this node up for lost"]), (0, [])]


def wait_until_it_hears_sigterm(process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        if int(status["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.05)
    raise AssertionError("it never does")


def test_a_supervisor_that_waits_for_its_node_can_be_stopped_and_stops_nobody(tmp_path: Path) -> None:
    path, port = script(tmp_path, SLEEPER), get_free_port()
    with (
        running(*options(0, port), path, tmp_path, "sleep") as first,
        running(*options(1, port), path, tmp_path, "sleep") as other,
    ):
        wait_for(tmp_path / "pid1")
        with running(*options(1, port), path, tmp_path, "sleep") as waiting:
            wait_until_it_hears_sigterm(waiting)
            waiting.terminate()
            _, err = waiting.communicate(timeout=20)
        assert ours(err)[-1].startswith("ended by SIGTERM before node 0")
        assert (first.poll(), other.poll()) == (None, None)
