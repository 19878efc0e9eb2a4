"""The examples run, as a user runs them."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import prepared
import pytest

from lightning_scar import load

ROOT = Path(__file__).parents[1]


def run(name: str, *options: str | Path, by: Sequence[str] = ()) -> str:
    done = prepared.run(
        [sys.executable, *by, str(ROOT / "examples" / name), *map(str, options)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.timeout(300)
def test_zero_is_cut_short_on_two_ranks_and_goes_on_on_one(tmp_path: Path) -> None:
    options = ("--dir", tmp_path / "scar", "--epochs", "1")
    first = run("zero.py", *options, "--steps", "25")
    assert "Resuming" not in first
    for rank in (0, 1):
        assert f"Rank {rank} made 3 saves" in first  # the first, at 10, and 20; and the one of the exception
    written = [float(size) for size in re.findall(r"saves, ([\d.]+) MB, the last at step 25", first)]
    assert len(written) == 2
    assert max(written) < 2 * min(written), written
    second = run("zero.py", *options, "--devices", "1")
    assert f"Resuming from the running checkpoint {tmp_path / 'scar'}: step 25," in second
    assert "Rank 0 made" in second
    # 25 steps of two ranks are 50 of the 140 batches of one.
    assert load(tmp_path / "scar")["global_step"] == 25 + 90


@pytest.mark.timeout(300)
def test_survive(tmp_path: Path) -> None:
    printed = run("survive.py", "--epochs", "1", "--step", "5")
    assert re.search(r"rank 0 was killed by SIGKILL in step [56]; 2 of 3 workers go on", printed)
    assert "all 3 workers are there again at step" in printed
    (end,) = re.findall(r"Rank 0 ends at step 46. Outages: \[(.*)\]", printed)
    assert "reason='rank 0 was killed by SIGKILL'" in end
    assert "steps_lost=0" in end


@pytest.mark.timeout(300)
def test_accelerate_mnist_is_cut_short_on_two_processes_and_goes_on_on_one(tmp_path: Path) -> None:
    options = ("--dir", tmp_path / "scar", "--epochs", "1")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    first = run("accelerate_mnist.py", *options, "--steps", "30", by=torchrun)
    assert "resuming" not in first
    assert sorted(path.name for path in (tmp_path / "scar").iterdir() if path.is_dir()) == ["rank-0000", "rank-0001"]
    second = run("accelerate_mnist.py", *options)
    assert f"lightning-scar: {tmp_path / 'scar'} holds a finished run: step 30," in second
    assert "trains on" in second
    # 30 steps of two processes are 60 of the 140 batches of one.
    assert re.search(r"epoch 0: accuracy 0\.\d+, step 110", second)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_accelerate_survive(tmp_path: Path) -> None:
    supervisor = ["-m", "lightning_scar", "run", "--nproc-per-node", "3"]
    printed = run("accelerate_survive.py", "--epochs", "2", "--dir", tmp_path / "scar", by=supervisor)
    assert re.search(r"rank 0 was killed by SIGKILL in step 2[01]; 2 of 3 workers go on", printed)
    assert "all 3 workers are there again at step" in printed
    (end,) = re.findall(r"The first worker ends at step 92. Outages: \[(.*)\]", printed)
    assert "reason='rank 0 was killed by SIGKILL'" in end
    assert "steps_lost=0" in end


@pytest.mark.timeout(300)
def test_fabric_mnist(tmp_path: Path) -> None:
    first = run("fabric_mnist.py", "--dir", tmp_path, "--epochs", "1")
    assert "epoch 0: accuracy 0." in first
    second = run("fabric_mnist.py", "--dir", tmp_path, "--epochs", "2")
    assert "holds a finished run: step 140," in second
    assert "epoch 0" not in second
    assert "epoch 1: accuracy 0." in second
    assert load(tmp_path / "epochs")["step"] == load(tmp_path / "scar")["global_step"] == 280
