"""What ``lightning-scar inspect`` says about a directory that two ranks saved to."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_cli import Command, run

from lightning_scar.core.ranks import Ranks
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings

__all__ = ["run"]


def save(rank: int, folder: Path, steps: int) -> None:
    weight = torch.zeros(64, 64)
    torch.manual_seed(0)
    with RunningCheckpoint(folder, Settings(fraction=0.25, block_size=1024), ranks=Ranks.of_default_group()) as running:
        for step in range(1, steps + 1):
            weight += torch.rand(64, 64)
            checkpoint = {"state_dict": {"layer.weight": weight}, "global_step": step}
            running.save_now(checkpoint, step, parameters=[weight])
            # As far apart as the ranks of a training may be at most.
            running._writer.drain()
            dist.barrier()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    run_ranks(save, 2, tmp_path / "scar", steps=5)
    return tmp_path / "scar"


def ranks_shown(text: str) -> dict[str, list[str]]:
    """The cells of the table of ranks, by rank."""
    table = text[text.index("What every rank saved last") : text.index("Newest version")]
    found = (line for line in table.splitlines() if re.match(r"│ +\d", line))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in found]
    return {first: others for first, *others in rows}


def test_inspect_lists_every_rank(run: Command, saved: Path) -> None:
    shown = run("inspect", saved)
    assert shown.returncode == 0, shown.stderr
    rows = ranks_shown(shown.stdout)
    assert sorted(rows) == ["0", "1"]
    for rank, (step, owns, age, distance, files, on_disk) in rows.items():
        assert step == "5"
        assert owns.endswith("kB")
        assert 0 < int(age.removesuffix(" steps")) < 5
        assert float(distance) > 0
        assert int(files) == len(list(saved.glob(f"rank-000{rank}/*.safetensors"))) > 1
        assert on_disk.endswith("kB")
    assert "not known" not in shown.stdout


def test_inspect_says_whose_folder_is_gone(run: Command, saved: Path) -> None:
    shutil.rmtree(saved / "rank-0001")
    shown = run("inspect", saved)
    assert shown.returncode == 0, shown.stderr
    rows = ranks_shown(shown.stdout)
    assert rows["0"][0] == "5"
    assert rows["1"][0] == "nothing is there"
    assert rows["1"][-2:] == ["0", "0 B"]
    assert "not known" in shown.stdout, "the distance of what is lost"


def test_inspect_tells_ranks_of_an_earlier_start(run: Command, saved: Path) -> None:
    with RunningCheckpoint(saved, Settings(fraction=0.25, block_size=1024)) as running:
        checkpoint = running.restore().checkpoint
        checkpoint["state_dict"]["layer.weight"] += 1
        running.save_now(checkpoint, 6)
    rows = ranks_shown(run("inspect", saved).stdout)
    assert rows["0"][0] == "6"
    assert rows["1"][0] == "of an earlier start"
