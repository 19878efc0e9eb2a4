import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_scar import load
from lightning_scar.__main__ import main
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings
from lightning_scar.storage.delta import StoredBlock
from lightning_scar.storage.host_memory import VARIABLE
from lightning_scar.storage.places import open_store


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


class Command:
    """Runs the command in this process: what it prints, and how it ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.setenv("COLUMNS", "200")

    def __call__(self, *arguments: str | Path) -> Done:
        self._monkeypatch.setattr(sys, "argv", ["lightning-scar", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = self._capsys.readouterr()
        code = end.value.code
        return Done(1, out, err + code) if isinstance(code, str) else Done(int(code or 0), out, err)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "scar"
    weight = torch.zeros(64, 64)
    with RunningCheckpoint(folder, Settings(fraction=0.25, block_size=1024)) as running:
        for step in range(1, 6):
            weight += torch.rand(64, 64)
            checkpoint = {"state_dict": {"layer.weight": weight, "tied.weight": weight}, "global_step": step}
            running.save_now(checkpoint, step)
    return folder


def test_inspect_shows_steps_blocks_and_ages(run: Command, saved: Path) -> None:
    shown = run("inspect", saved)
    assert shown.returncode == 0, shown.stderr
    for expected in ("layer.weight", "16", "3 steps", "step 1"):
        assert expected in shown.stdout


def test_inspect_and_export_see_what_is_in_memory(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    folder, weight = tmp_path / "scar", torch.zeros(64, 64)
    with RunningCheckpoint(folder, Settings(fraction=1.0, memory=True)) as running:
        for step in range(1, 4):
            weight += 1
            running.save_now({"state_dict": {"weight": weight}, "global_step": step}, step)
        running.flush()
        shown = run("inspect", folder)
        assert re.search(r"step +│ 3 ", shown.stdout), shown.stdout
        assert "of these in this host's memory" in shown.stdout
        assert run("verify", folder).returncode == 0
        assert run("export", folder, tmp_path / "weights.safetensors").returncode == 0
        assert torch.equal(load_file(tmp_path / "weights.safetensors")["weight"], weight)
    assert "memory" not in run("inspect", folder).stdout


def test_verify_accepts_an_intact_directory(run: Command, saved: Path) -> None:
    done = run("verify", saved)
    assert done.returncode == 0
    assert "intact" in done.stdout


def test_verify_names_the_damaged_block_and_exits_with_1(run: Command, saved: Path) -> None:
    newest, block = _newest_block(saved)
    _damage(newest, block.slots["param"].start)
    done = run("verify", saved)
    assert done.returncode == 1
    assert block.key in done.stdout
    assert newest.name in done.stdout.replace("\n", "")


def _newest_block(saved: Path) -> tuple[Path, StoredBlock]:
    """The newest file, and one of the blocks of the state in it."""
    store = open_store(saved)
    store.refresh()
    delta = max(store.deltas, key=lambda delta: delta.head.sequence)
    return saved / delta.name, next(block for block in delta.blocks if block.group == "state_dict/layer.weight")


def _damage(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def test_an_exported_ckpt_is_what_load_returns(run: Command, saved: Path, tmp_path: Path) -> None:
    assert run("export", saved, tmp_path / "out.ckpt").returncode == 0
    exported = torch.load(tmp_path / "out.ckpt")
    assert exported["global_step"] == 5
    assert torch.equal(exported["state_dict"]["layer.weight"], load(saved)["state_dict"]["layer.weight"])


def test_a_consistent_export_holds_one_step(run: Command, saved: Path, tmp_path: Path) -> None:
    assert run("export", saved, tmp_path / "out.ckpt", "--consistent=true").returncode == 0
    exported = torch.load(tmp_path / "out.ckpt")
    assert exported["global_step"] == 1
    assert bool((exported["state_dict"]["layer.weight"] <= 1).all())


def test_exported_weights_have_the_models_names(run: Command, saved: Path, tmp_path: Path) -> None:
    assert run("export", saved, tmp_path / "out.safetensors").returncode == 0
    weights = load_file(tmp_path / "out.safetensors")
    assert sorted(weights) == ["layer.weight", "tied.weight"]
    assert torch.equal(weights["layer.weight"], weights["tied.weight"])


def test_an_existing_file_is_not_overwritten_unasked(run: Command, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.ckpt"
    out.write_bytes(b"precious")
    refused = run("export", saved, out)
    assert refused.returncode == 1
    assert "--overwrite=true" in refused.stderr
    assert out.read_bytes() == b"precious"
    assert run("export", saved, out, "--overwrite=true").returncode == 0


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["export", "out.ckpt"]])
def test_a_directory_without_a_running_checkpoint_is_one_clear_line(
    run: Command, tmp_path: Path, command: list[str]
) -> None:
    done = run(command[0], tmp_path / "nothing", *command[1:])
    assert done.returncode == 1
    assert "holds no running checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_extension_is_refused_with_the_known_ones(run: Command, saved: Path, tmp_path: Path) -> None:
    done = run("export", saved, tmp_path / "out.bin")
    assert done.returncode == 1
    assert ".ckpt or .safetensors" in done.stderr


def test_the_command_is_a_program(saved: Path) -> None:
    command = [sys.executable, "-m", "lightning_scar", "verify", str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "intact" in done.stdout
