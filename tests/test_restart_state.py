"""What workers leave for a start of all: where it lies, when memory is full, and how much of it there is."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from scar_ddp_runs import assert_done, train

from lightning_scar.continuation.restart_state import (
    drop_restart_state,
    newest_restart_state,
    note_incarnation,
    noted_incarnation,
    pop_own_state,
    save_own_state,
    save_restart_state,
)
from lightning_scar.continuation.snapshot import random_state
from lightning_scar.continuation.step_generators import StepGenerators
from lightning_scar.elastic.worker.state_folder import DISK, VARIABLE


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A real file system of 64 KiB, from which a link leads to a folder on disk."""
    memory, disk = tmp_path / "memory", tmp_path / "on-disk"
    memory.mkdir()
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(memory)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    (memory / DISK).symlink_to(disk)
    monkeypatch.setenv(VARIABLE, str(memory))
    yield memory
    subprocess.run(["umount", str(memory)], check=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != DISK)


def test_a_state_that_memory_has_no_room_for_goes_to_disk(memory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = (memory / DISK).resolve()
    save_restart_state({"weights": torch.zeros(100)}, training=1, step=3)
    assert (names(memory), names(disk)) == (["call-0001-000000003.ckpt"], [])
    assert capsys.readouterr().err == ""
    save_restart_state({"weights": torch.ones(100_000)}, training=1, step=7)
    assert (names(memory), names(disk)) == ([], ["call-0001-000000007.ckpt"])
    said = f"lightning-scar: call-0001-000000007.ckpt, which a restart needs, is kept in {disk}: "
    assert capsys.readouterr().err.startswith(said)
    newest = newest_restart_state(1)
    assert newest is not None
    assert newest.step == 7
    assert torch.load(newest.path)["weights"].sum() == 100_000
    drop_restart_state(1)
    assert newest_restart_state(1) is None


def test_what_is_small_goes_to_disk_with_it(memory: Path) -> None:
    (memory / "filler").write_bytes(b"x" * (64 << 10))
    save_own_state(1, {"random": torch.zeros(5000, dtype=torch.uint8), "global_step": 3})
    note_incarnation(1, 5)
    assert names(memory / DISK) == ["own-1.pt", "start-0001"]
    (memory / "filler").unlink()
    note_incarnation(1, 6)
    assert (noted_incarnation(1), names(memory / DISK)) == (6, ["own-1.pt"])
    assert pop_own_state(1, 3)["random"].numel() == 5000
    assert pop_own_state(1, 3) == {}
    save_own_state(1, {"global_step": 3})
    assert pop_own_state(1, 4) == {}


def test_generators_that_find_no_room_are_not_known(memory: Path) -> None:
    """Nor does anything fail, also where memory fills up later."""
    generators = StepGenerators(slot=0)
    generators.note(1, random_state())
    with (memory / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while filler.write(b"x" * 4096):
            pass
    generators.note(2, random_state())
    assert generators.of(0, step=2) is not None
    generators.note(2, random_state(), slot=1)
    assert generators.of(1, step=2) is None


def test_where_the_disk_is_full_too_the_file_is_named(memory: Path) -> None:
    (memory / DISK).unlink()
    with pytest.raises(OSError, match=r"no room for call-0001-000000007.ckpt, which a restart needs: .*No space left"):
        save_restart_state({"weights": torch.ones(100_000)}, training=1, step=7)
    assert names(memory) == []


def test_finished_trainings_do_not_pile_up_in_memory(memory: Path) -> None:
    for training in (1, 2, 3):
        save_restart_state({}, training, step=9, is_finished=True)
    assert (names(memory), len(names(memory / DISK))) == ([], 3)
    assert [newest_restart_state(training) is not None for training in (1, 2, 3, 4)] == [True] * 3 + [False]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["sanity check", "validation"])
def test_finished_fits_are_kept_on_disk_and_not_made_again(tmp_path: Path, where: str) -> None:
    """Of three, the last one is cut short; nobody saves to storage."""
    training = train(tmp_path, (f"third fit's {where}", 0, 1, "kill"), fits_before=2)
    assert training.code == 0, training.console
    assert "starting all workers again" in training.console
    for slot in (0, 1):
        assert [step["step"] for step in training.steps if step["slot"] == slot] == [*range(1, 25)] * 3
        kept = (tmp_path / f"kept-{slot}.jsonl").read_text().splitlines()
        assert json.loads(kept[0])["in_memory"] == []
    assert training.results[0]["global_step"] == 24


@pytest.mark.slow
@pytest.mark.parametrize("door", ["Trainer", "Accelerate"])
def test_all_start_again_with_their_state_where_memory_is_full(tmp_path: Path, door: str) -> None:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    inside = 'mount -t tmpfs -o size=16k tmpfs /dev/shm && exec "$@"'
    run = [sys.executable, "-m", "lightning_scar", "run", "--nproc-per-node", "2"]
    command = ["unshare", "--mount", "sh", "-c", inside, "sh", *run]
    training = train(tmp_path, ("validation", 0, 1, "kill"), command=command, door=door)
    assert_done(training, steps=24)
    assert "which a restart needs, is kept in /" in training.console
    assert "starting all workers again" in training.console
