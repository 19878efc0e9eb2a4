"""Several nodes, on the loopback."""

from pathlib import Path

from elastic_helpers import PLAIN, SLEEPER, assert_gone, ours, run, running, script, wait_for
from torch.distributed.elastic.utils.distributed import get_free_port


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


def test_nodes_that_disagree(tmp_path: Path) -> None:
    path, port = script(tmp_path, SLEEPER), get_free_port()
    with running(*options(0, port), path, tmp_path, "sleep"):
        wait_for(tmp_path / "pid0")
        done = run(*options(1, port), "--nproc-per-node", "2", path, tmp_path)
    assert done.returncode == 1
    assert "--nproc-per-node is 2 on this node and 1 on node 0" in done.stderr
