"""Saves beside the training on a side stream: old values, and a training thread that waits for nothing."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpt import GPT2_SMALL_ON_DEVICE, TINY, GPTModule, new_trainer, token_loader
from benchmarks.methods import GatedSCARCheckpoint
from gpu.part import NotShown, Setting

TESTS = Path(__file__).parents[1]
#: What lets a thread wait for the device.
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaFree")
#: Names of the two kinds of steps in the profile.
WITH, WITHOUT = "a step with a save", "a step without a save"


# -- tests of the core ---------------------------------------------------------------------------------------------


def tests(setting: Setting) -> dict[str, Any]:
    """What `tests/core` has for a device; on the CPU that with a stand-in which runs everything late."""
    files = ["test_gpu.py"] if setting.is_on_card else ["test_devices.py"]
    if setting.is_on_card and importlib.util.find_spec("hypothesis"):  # of which its other tests have examples
        files.append("test_codec.py")
    report, config = setting.folder / "report.xml", setting.folder / "pytest.ini"
    # Neither plugins nor conftest.py, which need more packages.
    config.write_text("[pytest]\nmarkers = gpu: needs a device\n slow: takes long\n")
    which = ["-m", "gpu"] if setting.is_on_card else ["-k", "step or order"]
    command = [sys.executable, "-m", "pytest", "-c", str(config), "--rootdir", str(TESTS), "--noconftest", *which]
    command += ["-p", "no:cacheprovider", f"--basetemp={setting.folder / 'tmp'}", f"--junitxml={report}"]
    path = [str(TESTS), str(TESTS / "core"), os.environ["PYTHONPATH"]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run([*command, *(str(TESTS / "core" / file) for file in files)], env=environment, stdout=sys.stderr)
    return counted(report)


def counted(report: Path) -> dict[str, Any]:
    """What pytest's XML says; at least one test must have run, and none may have failed."""
    if not report.exists():
        raise NotShown("pytest has written no report", {})
    ways: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        way = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        ways[way].append(case.get("name") or "")
    figures = {**{way: len(names) for way, names in ways.items()}, "failing": ways["failed"]}
    if ways["failed"] or not ways["passed"]:
        raise NotShown(f"failed: {ways['failed']}; passed: {len(ways['passed'])}", figures)
    return figures


# -- a profile of a Trainer ----------------------------------------------------------------------------------------


class Steps(Callback):
    """Marks whole steps in a profile, from the end of a batch to the end of the next, by turns with a save and without.

    Args:
        scar: Saves when its gate is open.
        steps: How many are marked.

    """

    #: Steps without marks: the first save is full, and buffers are allocated in the next ones.
    WARM_UP = 6

    def __init__(self, scar: GatedSCARCheckpoint, steps: int) -> None:
        self._scar = scar
        self._steps = steps
        self._batches = 0
        self._mark: Any = None

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Come before the hook of the save."""
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
        self._batches += 1
        if self._batches >= self.WARM_UP:
            self._scar.wait()
        number = self._batches - self.WARM_UP
        self._scar.is_open = self._batches < self.WARM_UP or number % 2 == 0
        if 0 <= number < self._steps:
            self._mark = record_function(WITH if number % 2 == 0 else WITHOUT)
            self._mark.__enter__()
        trainer.should_stop = number >= self._steps


def waits(setting: Setting) -> dict[str, Any]:
    """A step with a save calls nothing in the training thread that waits for the device, unless one without does."""
    scar = GatedSCARCheckpoint(setting.folder / "scar", 0.125)
    size = TINY if setting.is_quick else GPT2_SMALL_ON_DEVICE
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.is_on_card else [])]
    trainer = new_trainer([Steps(scar, steps=8), scar], setting.device)
    module = GPTModule(size, setting.device)
    with profile(activities=activities) as profiled:
        trainer.fit(module, token_loader(size))
    trace = setting.folder / "trace.json"
    profiled.export_chrome_trace(str(trace))
    found = calls_that_wait(json.loads(trace.read_text()))
    figures = {"steps": found.pop("steps"), **{kind: dict(calls) for kind, calls in found.items()}}
    if not figures["steps"]:
        raise NotShown("the profile has no steps", figures)
    # Each kind has as many steps.
    if more := found["with"] - found["without"]:
        raise NotShown(f"a save lets the training thread wait: {dict(more)}", figures)
    return figures


def calls_that_wait(trace: dict[str, Any]) -> dict[str, Any]:
    """Count calls that wait, by the kind of the step around them in the same thread.

    Args:
        trace: As torch's profiler exports it.

    Returns:
        The number of steps of each kind, and of calls, by their names, in steps ``with`` a save and ``without``.

    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = [event for event in events if event["name"] in (WITH, WITHOUT) and event.get("cat") == "user_annotation"]
    calls = [event for event in events if _can_wait(event)]
    found = {WITH: Counter[str](), WITHOUT: Counter[str]()}
    for step in steps:
        begin, end = step["ts"], step["ts"] + step["dur"]
        inside = [call for call in calls if call["tid"] == step["tid"] and begin <= call["ts"] <= end]
        found[step["name"]].update(_plain(call) for call in inside)
    number = min(sum(step["name"] == kind for step in steps) for kind in (WITH, WITHOUT))
    return {"steps": number, "with": found[WITH], "without": found[WITHOUT]}


def _can_wait(event: dict[str, Any]) -> bool:
    return event.get("cat") in ("cuda_runtime", "cuda_driver") and _plain(event) in WAITS


def _plain(event: dict[str, Any]) -> str:
    """The name without the version that some drivers add."""
    return str(event["name"]).split("_")[0]
