"""The random generators of each slot, noted at each step where other workers of the host find them."""

import multiprocessing
import os
import signal
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_scar.continuation.snapshot import random_state
from lightning_scar.continuation.step_generators import StepGenerators, _records
from lightning_scar.elastic.worker.state_folder import VARIABLE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def state(step: int) -> list[Tensor | None]:
    """Something that tells its step, as large as the real one."""
    return [torch.full((5056,), step % 251, dtype=torch.uint8), None]


def test_another_worker_draws_the_same(folder: Path) -> None:
    generators = StepGenerators(slot=2)
    generators.note(6, random_state())
    generators.note(7, random_state())
    drawn = torch.rand(3)
    other = StepGenerators(slot=0)
    kept = other.of(2, step=7)
    assert kept is not None
    torch.set_rng_state(kept[0])
    assert torch.equal(torch.rand(3), drawn)
    assert (other.of(2, step=5), other.of(2, step=8), other.of(1, step=7)) == (None, None, None)


def test_of_a_step_the_first_batch_counts(folder: Path) -> None:
    generators = StepGenerators(slot=1)
    generators.begin(4, random_state())
    drawn = torch.rand(3)
    generators.begin(4, random_state())
    StepGenerators(slot=1).take_over(4)
    assert torch.equal(torch.rand(3), drawn)
    # What was noted at the end of the step before is replaced when the step begins.
    generators.note(5, state(0))
    generators.begin(5, state(9))
    kept = generators.of(1, step=5)
    assert kept is not None
    assert kept[0].tolist() == [9] * 5056


def test_a_replacement_goes_on_where_the_dead_worker_stood(folder: Path) -> None:
    """Or where another worker has covered its batches up to."""
    StepGenerators(slot=1).note(4, random_state())
    drawn = torch.rand(3)
    StepGenerators(slot=1).take_over(9)
    assert torch.equal(torch.rand(3), drawn)
    StepGenerators(slot=0).note(5, random_state(), slot=1)
    drawn = torch.rand(3)
    StepGenerators(slot=1).take_over(5)
    assert torch.equal(torch.rand(3), drawn)
    # Nor does it lose that while it has no state of the training yet.
    StepGenerators(slot=1).note(-1, random_state())
    assert StepGenerators(slot=1).of(1, step=5) is not None
    # Of a step that is not reached, or of which nothing is known, nothing is taken.
    before = torch.get_rng_state()
    StepGenerators(slot=1).take_over(3)
    StepGenerators(slot=3).take_over(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_state_of_a_device_rides_along(folder: Path) -> None:
    generators = StepGenerators(slot=0)
    generators.note(1, [torch.arange(9, dtype=torch.uint8), torch.arange(16, dtype=torch.uint8)])
    kept = generators.of(0, step=1)
    assert kept is not None
    assert [part.tolist() for part in kept] == [[*range(9)], [*range(16)]]
    # What has no room in a record is not known.
    generators.note(3, [torch.zeros(9000, dtype=torch.uint8), None])
    assert generators.of(0, step=3) is None


@pytest.mark.parametrize("at", [0, 8, 12, 100, 5071, 5073])
def test_a_torn_record_is_not_taken(folder: Path, at: int) -> None:
    generators = StepGenerators(slot=0)
    generators.note(4, state(4))
    generators.note(5, state(5))
    (path,) = folder.iterdir()
    content = bytearray(path.read_bytes())
    content[at] ^= 255
    path.write_bytes(content)
    assert generators.of(0, step=4) is None
    assert generators.of(0, step=5) is not None
    path.write_bytes(content[:9000])
    assert generators.of(0, step=5) is None


def _note_for_ever() -> None:
    generators = StepGenerators(slot=1)
    for step in count(1):
        generators.note(step, state(step))


def test_what_a_killed_worker_was_writing(folder: Path) -> None:
    reader = StepGenerators(slot=0)
    for _ in range(5):
        process = multiprocessing.get_context("fork").Process(target=_note_for_ever)
        process.start()
        assert process.pid is not None
        while process.is_alive() and not any(step >= 400 for step, _ in _records(1)):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kept = dict(_records(1))
        assert 1 <= len(kept) <= 2
        assert all(torch.equal(found[0], state(step)[0]) for step, found in kept.items())
        StepGenerators(slot=1).note(max(kept) + 1, state(max(kept) + 1))
        assert reader.of(1, max(kept) + 1) is not None
    assert [path.stat().st_size for path in folder.iterdir()] == [16384]


def test_without_a_supervisor_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    generators = StepGenerators(slot=0)
    generators.note(1, random_state())
    generators.take_over(1)
    assert generators.of(0, step=1) is None
