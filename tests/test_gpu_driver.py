"""`make gpu` goes on when a part fails, ends what hangs, and tells what came of each; its parts run on the CPU, too."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from gpu import driver
from gpu.part import NotShown, Part, Setting, Skipped
from gpu.parts import PARTS

ROOT = Path(__file__).parents[1]


def works(setting: Setting) -> dict[str, Any]:
    return {"device": setting.device, "quick": setting.is_quick, "files": len(list(setting.folder.iterdir()))}


def fails(setting: Setting) -> dict[str, Any]:
    print("on its way", file=sys.stderr)
    raise NotShown("it is not so", {"found": 0.125})


def is_left_out(setting: Setting) -> dict[str, Any]:
    raise Skipped("only a card can show it")


def dies(setting: Setting) -> dict[str, Any]:
    os.kill(os.getpid(), 9)
    return {}


def hangs(setting: Setting) -> dict[str, Any]:
    """With a process in a session of its own."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
    (setting.folder.parents[2] / "child").write_text(str(child.pid))
    time.sleep(100)
    return {}


TRIED = {
    function.__name__: Part(
        function.__name__, "something", f"test_gpu_driver:{function.__name__}", seconds, tells=tells
    )
    for function, seconds, tells in (
        (works, 60, ("device",)),
        (fails, 60, ("found",)),
        (is_left_out, 60, ()),
        (dies, 60, ()),
        (hangs, 6, ()),
    )
}


def tried(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and what is in the JSON file."""
    monkeypatch.setattr(driver, "PARTS", TRIED)
    out = folder / "found.json"
    options = ["--device", "cpu", "--quick", "--json", str(out), "--dir", str(folder)]
    code = driver.main([*options, *(["--parts", *names] if names else [])])
    return code, json.loads(out.read_text())


@pytest.mark.slow
def test_the_others_go_on_where_a_part_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = tried(monkeypatch, tmp_path)
    states = {name: part["state"] for name, part in found["parts"].items()}
    ends = {"works": "passed", "fails": "failed", "is_left_out": "skipped", "dies": "failed", "hangs": "timed out"}
    assert (code, states) == (1, ends)
    assert "on its way" in found["parts"]["fails"]["output"]
    assert found["parts"]["fails"]["figures"] == {"found": 0.125}
    assert found["parts"]["dies"]["why"] == "it ended with exit code -9 and told nothing"
    table, told = capsys.readouterr()
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.count("|") > 4}
    assert "device cpu" in rows["works"]
    assert "it is not so; found 0.125" in rows["fails"]
    assert "only a card can show it" in rows["is_left_out"]
    assert "not done after 6 s" in rows["hangs"]
    assert all(need["command"] in table for need in found["more_cards"])
    assert "on its way" in told
    _, alive = psutil.wait_procs(left_in(tmp_path), timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert not list(tmp_path.glob(".gpu-*"))


def left_in(folder: Path) -> list[psutil.Process]:
    """What :func:`hangs` has started, if that still is a process."""
    try:
        return [psutil.Process(int((folder / "child").read_text()))]
    except (FileNotFoundError, psutil.NoSuchProcess):
        return []


def test_all_is_well_where_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = tried(monkeypatch, tmp_path, "works", "is_left_out")
    assert code == 0
    assert list(found["parts"]) == ["works", "is_left_out"]
    assert found["parts"]["works"]["figures"] == {"device": "cpu", "quick": True, "files": 0}


def test_no_part_begins_when_the_time_is_over(tmp_path: Path) -> None:
    results = driver.Driver("cpu", True, tmp_path, 0.0).run_all([TRIED["works"]])
    assert results["works"]["why"] == "no time was left for it"


def test_calls_that_wait_are_those_of_the_training_thread_within_steps() -> None:
    # Not where parts import this module, which takes them seconds.
    from gpu.staging import WITH, WITHOUT, calls_that_wait

    def event(name: str, at: float, tid: int = 1, cat: str = "cuda_runtime", dur: float = 1) -> dict[str, Any]:
        return {"ph": "X", "name": name, "cat": cat, "ts": at, "dur": dur, "tid": tid}

    events = [
        event(WITH, 0, cat="user_annotation", dur=10),
        event(WITHOUT, 20, cat="user_annotation", dur=10),
        event("cudaStreamSynchronize", 5),
        event("cudaStreamSynchronize", 25),
        event("cudaEventSynchronize_v3020", 6),
        event("cudaMemcpyAsync", 7),
        event("cudaDeviceSynchronize", 8, tid=2),
        event("cudaDeviceSynchronize", 15),
        {"ph": "M", "name": "process_name"},
    ]
    found = calls_that_wait({"traceEvents": events})
    assert found["steps"] == 1
    assert found["with"] == {"cudaStreamSynchronize": 1, "cudaEventSynchronize": 1}
    assert found["without"] == {"cudaStreamSynchronize": 1}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_parts_run_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    options = ["--device", "cpu", "--quick", "--json", str(out), "--dir", str(tmp_path), "--limit", "850"]
    done = subprocess.run([sys.executable, "-m", "tests.gpu", *options], cwd=ROOT, capture_output=True, text=True)
    found = json.loads(out.read_text())["parts"]
    assert {name: part["state"] for name, part in found.items()} == dict.fromkeys(PARTS, "passed"), done.stderr
    assert done.returncode == 0
    assert found["prepared"]["figures"]["parents"] > 0
    assert found["broken-device"]["figures"]["for_ever_code"] != 0
