"""The recipes of docs/clusters.md do what the page says, as far as one machine can tell."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.elastic.utils.distributed import get_free_port

from lightning_scar.elastic.supervisor.command_line import _parser

PAGE = (Path(__file__).parents[1] / "docs" / "clusters.md").read_text()

#: What the scripts of a batch system call; all nodes are this machine.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
pids=()
trap 'kill -USR1 "${pids[@]}"' USR1
for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" & pids+=($!); done
touch started
code=0
for pid in "${pids[@]}"; do
    wait $pid; this=$?
    while kill -0 $pid 2>/dev/null; do wait $pid; this=$?; done
    [ $this -gt $code ] && code=$this
done
exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; echo 127.0.0.2; else echo "$@" >> requeued; fi
"""
TRAINING = """
import time
from pathlib import Path
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_scar import SCARCheckpoint

class Model(BoringModel):
    def on_train_batch_end(self, *args):
        if self.global_step == 5 and not Path("requeued").exists():
            Path(f"at-5-{self.global_rank}").touch()
            time.sleep(1)

    def on_train_batch_start(self, *args):
        first = Path(f"resumed-{self.global_rank}")
        if Path("requeued").exists() and not first.exists():
            first.write_text(str(self.global_step))

if __name__ == "__main__":
    trainer = pl.Trainer(
        num_nodes=2, devices=1, accelerator="cpu", strategy="scar_ddp", max_steps=40, logger=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[SCARCheckpoint("scar", every_n_train_steps=10)],
    )
    trainer.fit(Model())
    Path(f"done-{trainer.global_rank}").write_text(str(trainer.global_step))
"""


def block(language: str, word: str) -> str:
    """The page's only block of this language with this word."""
    (found,) = [text for text in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if word in text]
    return found


def run_batch_script(folder: Path, ends: bool) -> int:
    """The script of the page on two nodes with a worker each. SLURM warns it at its fifth step unless it ends."""
    script = block("bash", "srun").replace("--nproc-per-node gpu", "--nproc-per-node 1")
    (folder / "job.sh").write_text(script.replace("29500", str(get_free_port())))
    environment = {
        **os.environ,
        "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    with (folder / "console.txt").open("a") as console:
        job = subprocess.Popen(
            ["bash", "job.sh"], cwd=folder, env=environment, stdout=console, stderr=console, start_new_session=True
        )
    deadline = time.monotonic() + 90
    is_warned = ends
    try:
        while job.poll() is None:
            assert time.monotonic() < deadline, (folder / "console.txt").read_text()
            if not is_warned and len(list(folder.glob("at-5-*"))) == 2:
                is_warned = True
                # The steps of the job get it, not its script.
                (srun,) = children(job.pid)
                os.kill(srun, signal.SIGUSR1)
            time.sleep(0.05)
        return job.returncode
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="a batch system on one machine")
@pytest.mark.slow
def test_slurm_warns_a_job_which_resumes_from_the_queue(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "train.py").write_text(TRAINING)
    code = run_batch_script(tmp_path, ends=False)
    console = (tmp_path / "console.txt").read_text()
    assert code == 138, console
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert run_batch_script(tmp_path, ends=True) == 0, (tmp_path / "console.txt").read_text()
    assert [(tmp_path / f"done-{rank}").read_text() for rank in range(2)] == ["40", "40"]
    # All stop after the same step, which the leader announces to them.
    first, second = ((tmp_path / f"resumed-{rank}").read_text() for rank in range(2))
    assert first == second in ("5", "6", "7")
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_pods_of_kubernetes_are_nodes() -> None:
    service, job = yaml.safe_load_all(block("yaml", "kind: Job"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["lightning-scar", "run"]
    options = _parser().parse_args([argument.replace("$(JOB_COMPLETION_INDEX)", "3") for argument in container["args"]])
    assert (options.nnodes, options.node_rank) == (job["spec"]["completions"], 3)
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    name, address = job["metadata"]["name"], options.rdzv_endpoint.split(":")[0]
    assert address == f"{name}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["terminationGracePeriodSeconds"] > options.stop_timeout
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    assert container["env"][0]["name"] == "LIGHTNING_SCAR_TOKEN"


def test_timeouts_are_those_of_the_page() -> None:
    defaults: Any = _parser().parse_args(["train.py"])
    rows = dict(re.findall(r"^\| [^|]*\| ([^|]*?) \| `(--[a-z-]+)`", PAGE, re.MULTILINE))
    documented = {option: float(re.match(r"\d+", text).group()) for text, option in rows.items()}  # type: ignore[union-attr]
    assert documented.keys() >= {"--node-timeout", "--stop-timeout", "--max-restarts"}
    for option, value in documented.items():
        assert getattr(defaults, option.removeprefix("--").replace("-", "_")) == value
