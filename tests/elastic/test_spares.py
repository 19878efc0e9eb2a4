"""Spares run the script up to where it asks for its place, and take that of whoever dies."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from elastic_helpers import assert_gone, code_of, ours, run, running, script, wait_for
from prepared import workers_are_prepared
from torch.distributed.elastic.utils.distributed import get_free_port

from lightning_scar.elastic.prepared.environment import OF_A_WORKER
from lightning_scar.elastic.prepared.starter import Starter
from lightning_scar.elastic.supervisor.command_line import main
from lightning_scar.elastic.supervisor.spares import Spares

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")

#: Asks for its place, in a way of its own, after it has told that it waits.
ASKS = """
import os, sys
from pathlib import Path
import torch
folder = Path(sys.argv[1])
(folder / "waits").write_text(str(os.getpid()))
{}
(folder / "place").write_text(os.environ["RANK"] + os.environ["COMMON"])
"""
WAYS = {
    "reads it": "os.environ['LOCAL_RANK']",
    "gets it": "os.getenv('WORLD_SIZE')",
    "looks for the supervisor": "'LIGHTNING_SCAR_STORE' in os.environ",
    "copies all": "dict(os.environ)",
    "opens a device": """
try:
    torch.cuda._lazy_init()
except Exception:
    pass
(folder / "place").write_text(dict.get(os.environ._data, b"RANK", b"").decode() + "x")
sys.exit()
""",
}


SEVENTH = dict.fromkeys(OF_A_WORKER, "7")


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture
def spares_of(tmp_path: Path, told: list[str]) -> Iterator[Callable[[str], Spares]]:
    """Makes the one spare of a script."""
    open_ones: list[Starter | Spares] = []

    def make(text: str) -> Spares:
        starter = Starter(
            [sys.executable, str(script(tmp_path, text)), str(tmp_path)], {}, tmp_path / "imports", told.append
        )
        spares = Spares(starter, 1, {"COMMON": "x"}, told.append)
        open_ones.extend([spares, starter])
        spares.refill()
        while not starter.is_ready:
            time.sleep(0.01)
        # Nobody trains yet.
        spares.refill()
        assert not spares._waiting
        (tmp_path / "imports").write_text("[]")
        starter.import_more()
        while not starter.is_ready:
            time.sleep(0.01)
        spares.refill()
        assert len(spares._waiting) == 1
        return spares

    with workers_are_prepared():
        yield make
    for one in open_ones:
        one.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_spare_waits_where_the_script_asks_for_its_place(
    way: str, tmp_path: Path, spares_of: Callable[[str], Spares]
) -> None:
    spares = spares_of(ASKS.format(WAYS[way]))
    [pid] = wait_for(tmp_path / "waits")
    # It sleeps in a system call.
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}/wchan").exists() and " S " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline
    assert not (tmp_path / "place").exists()
    worker = spares.take(SEVENTH)
    assert worker is not None
    assert worker.pid == int(pid)
    assert code_of(worker) == 0
    assert (tmp_path / "place").read_text() == "7x"
    assert spares.take(SEVENTH) is None


def test_a_script_that_ends_by_itself_has_no_spares(
    tmp_path: Path, spares_of: Callable[[str], Spares], told: list[str]
) -> None:
    told.clear()
    spares = spares_of("import sys; sys.exit(3)")
    while spares._waiting:
        spares.refill()
        time.sleep(0.01)
    spares.refill()
    assert not spares._waiting
    assert told == ["there are no spares: one exited with code 3 before it asked for its rank"]


def test_a_spare_that_was_killed_is_replaced(tmp_path: Path, spares_of: Callable[[str], Spares]) -> None:
    spares = spares_of(ASKS.format(WAYS["reads it"]))
    [(first, _)] = spares._waiting
    os.kill(first.pid, 9)
    code_of(first)
    spares.refill()
    worker = spares.take(SEVENTH)
    assert worker is not None
    assert worker.pid != first.pid
    assert code_of(worker) == 0


def test_spares_end_with_the_job(tmp_path: Path, spares_of: Callable[[str], Spares]) -> None:
    spares = spares_of(ASKS.format(WAYS["reads it"]))
    [pid] = wait_for(tmp_path / "waits")
    [(worker, _)] = spares._waiting
    spares.close()
    code_of(worker)
    assert_gone(pid)


@pytest.mark.parametrize("options", [["--spares", "-1"], ["--spares", "1", "--fresh"]])
def test_bad_numbers_of_spares_are_named(options: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*options, "x.py"]) == 1
    assert f"--spares is {options[1]}" in capfd.readouterr().err


#: Rank 1 dies when the spare waits.
TRAINING = """
import os, signal, sys, time
from pathlib import Path
import lightning_scar
import lightning.pytorch as pl
import torch

folder, nodes, is_broken = Path(sys.argv[1]), int(sys.argv[2]), "broken" in sys.argv
(folder / f"started-{os.getpid()}").touch()

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, i):
        if i == 5 and self.global_rank == 1 and not (folder / "killed").exists():
            while len(list(folder.glob("started-*"))) < 2 + nodes:
                time.sleep(0.02)
            (folder / "killed").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

trainer = pl.Trainer(
    accelerator="cpu", devices=2 // nodes, num_nodes=nodes, strategy="scar_ddp", max_steps=12, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
if is_broken and (folder / "killed").exists():
    os._exit(3)
trainer.fit(Model(), torch.utils.data.DataLoader(torch.randn(64, 2), batch_size=2))
(folder / f"end-{trainer.global_rank}").write_text(f"{os.getpid()} {trainer.global_step}")
"""


@pytest.mark.timeout(120)
def test_a_spare_takes_the_place_of_a_worker_that_dies(tmp_path: Path) -> None:
    done = run("--nproc-per-node", "2", "--spares", "1", script(tmp_path, TRAINING), tmp_path, "1")
    assert done.returncode == 0, done.stderr
    assert [line for line in ours(done.stderr) if "there again" in line]
    killed = (tmp_path / "killed").read_text()
    pid, steps = (tmp_path / "end-1").read_text().split()
    assert steps == "12"
    # It was there when the other one died.
    there = sorted((path.stat().st_mtime_ns, path.name.split("-")[1]) for path in tmp_path.glob("started-*"))[:3]
    assert pid != killed
    assert {killed, pid} <= {number for _, number in there}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_spare_elsewhere_takes_the_slot_of_a_node_that_is_broken(tmp_path: Path) -> None:
    """Whatever starts on node 1 dies when its device is opened."""
    path, port = script(tmp_path, TRAINING), get_free_port()
    common = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}", "--spares", "1", "--max-restarts", "5"]
    with running(*common, "--node-rank", "1", path, tmp_path, "2", "broken") as other:
        done = run(*common, "--node-rank", "0", path, tmp_path, "2")
        other.communicate(timeout=30)
    assert (done.returncode, other.returncode) == (0, 0), done.stderr
    moved = "rank 1 exited with code 3; a spare of node 0 takes its place, since it cannot start on its own node"
    assert moved in ours(done.stderr)
    assert (tmp_path / "end-1").read_text().endswith(" 12")
