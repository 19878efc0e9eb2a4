"""What saving to memory before the disk gains and costs: ``python -m benchmarks.tiers --json OUT``.

- Partial saves to memory and to disk in turn, each alone: ``*_stall_s`` is how long an eager one stalled the training
  thread (``*_lazy_stall_s`` a lazy one, beside a forward and backward), ``*_written_s`` how long an eager one took from
  its beginning until it was written.
- A restore into live tensors from this host's memory (``own_s``), of what only a neighbour's memory has
  (``neighbour_s``: it is copied to disk and read there), and from disk with the files in the page cache
  (``disk_warm_s``) and dropped from it (``disk_cold_s``).
- How fast the files of a rank's memory are copied to another process, each replacing an older one as in a training
  (``replication_bytes_per_s``), compared with a plain socket between existing buffers. And how long the first copy
  takes (``first_copy_s``), for which that process allocates memory, compared with just that: writing as many bytes to a
  new file in memory (``anew_s``).
- Training steps with a save to memory at each, in turn with such copies and without. The receiving process has no
  cores of its own here, as another host would.
"""

import argparse
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import psutil

from benchmarks import report, tiers_restore, tiers_saves
from benchmarks.gpt import GPT2_SMALL, TINY, Size, state_bytes
from benchmarks.ranks import State
from benchmarks.report import Target, median
from benchmarks.stall import FRACTION
from benchmarks.tiers_peers import memory_folder
from benchmarks.tiers_saves import Samples
from lightning_scar.storage.host_memory import VARIABLE

#: The most that it needs, in sizes of the state: in the host's memory, of that in files, and on disk.
_STATES_AT_ALL, _STATES_IN_MEMORY, _STATES_ON_DISK = 9, 5, 5


def figures(samples: Samples, facts: dict[str, Any]) -> dict[str, Any]:
    """Return medians and ratios of a run."""
    found: dict[str, Any] = {key: median(values) for key, values in samples.items()} | facts
    for kind in ("", "lazy_"):
        ratios = _ratios(samples, f"memory_{kind}stall_s", f"disk_{kind}stall_s")
        found[f"memory_{kind}stall_over_disk"] = median(ratios)
    found["memory_stall_over_floor"] = found["memory_stall_s"] / found["floor_s"]
    found["memory_written_over_disk"] = found["memory_written_s"] / found["disk_written_s"]
    for tier in ("own", "neighbour"):
        for peer in ("disk_cold", "disk_warm", "copy"):
            found[f"{tier}_over_{peer}"] = found[f"{tier}_s"] / found[f"{peer}_s"]
    for way in ("replication", "socket"):
        found[f"{way}_bytes_per_s"] = found["replicated_bytes"] / found[f"{way}_s"]
    found["replication_over_socket"] = found["replication_bytes_per_s"] / found["socket_bytes_per_s"]
    found["socket_over_replication"] = 1 / found["replication_over_socket"]
    found["first_copy_over_anew"] = found["first_copy_s"] / found["anew_s"]
    ratios = _ratios(samples, "step_replicated_s", "step_not_replicated_s")
    found["step_replicated_over_not"] = median(ratios)
    found["step_replicated_over_not_from"], found["step_replicated_over_not_to"] = min(ratios), max(ratios)
    return {**found, "samples": samples}


def _ratios(samples: Samples, first: str, second: str) -> list[float]:
    """Return the ratios of samples that were taken one right after the other."""
    return [one / other for one, other in zip(samples[first], samples[second], strict=True)]


def targets(found: dict[str, Any]) -> list[Target]:
    """Return the targets."""
    return [
        # No longer, except for noise.
        Target("memory_stall_over_disk", found["memory_stall_over_disk"], 1.1),
        # Half the time of a cold disk, or as fast as a warm one.
        Target("own_s", found["own_s"], max(0.5 * found["disk_cold_s"], 1.1 * found["disk_warm_s"])),
        # At least half the speed of the machine's own copy.
        Target("socket_over_replication", found["socket_over_replication"], 2.0),
    ]


def _rows(found: dict[str, Any]) -> list[list[str]]:
    seconds = {
        "partial save, eager: thread stands still": ("memory_stall_s", "disk_stall_s", "floor_s"),
        "partial save, lazy: thread stands still": ("memory_lazy_stall_s", "disk_lazy_stall_s", "floor_s"),
        "partial save, until written": ("memory_written_s", "disk_written_s", None),
        "restore, own memory against a cold disk": ("own_s", "disk_cold_s", "copy_s"),
        "restore, own memory against a warm disk": ("own_s", "disk_warm_s", "copy_s"),
        "restore, a neighbour's memory against a cold disk": ("neighbour_s", "disk_cold_s", "copy_s"),
        "copies to another process, file by file, against a plain socket": ("replication_s", "socket_s", None),
        "first copy to another process against a write to new memory": ("first_copy_s", "anew_s", "socket_s"),
        "training step with copies against one without": ("step_replicated_s", "step_not_replicated_s", None),
    }
    # Measured one right after the other: conditions are equal within a pair, but not across pairs.
    paired = {
        "memory_stall_s": "memory_stall_over_disk",
        "memory_lazy_stall_s": "memory_lazy_stall_over_disk",
        "step_replicated_s": "step_replicated_over_not",
    }
    rows = []
    for title, (own, peer, floor) in seconds.items():
        ratio = found[paired[own]] if own in paired else found[own] / found[peer]
        rows.append([title, *(f"{found[key]:.4f}" if key else "" for key in (own, peer, floor)), f"{ratio:.2f}"])
    return rows


def place_in_memory() -> Path:
    """Return the parent of folders in memory; exit if there is none."""
    parent = Path(os.environ.get(VARIABLE) or "/dev/shm")
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        sys.exit(f"{parent} is not a writable folder: set {VARIABLE} to one in memory (tmpfs)")
    return parent


def check_room(state: int, parent: Path, folder: Path) -> None:
    """Exit if there is too little space, and say where.

    Args:
        state: Bytes of the state.
        parent: The parent of files in memory.
        folder: The folder on disk.

    """
    room = {
        f"in {parent} (give a container more --shm-size, or set {VARIABLE} to another tmpfs folder)": (
            shutil.disk_usage(parent).free,
            _STATES_IN_MEMORY,
        ),
        "of memory in all": (psutil.virtual_memory().available, _STATES_AT_ALL),
        f"on disk in {folder} (choose another one with --dir)": (shutil.disk_usage(folder).free, _STATES_ON_DISK),
    }
    missing = [
        f"needs {states * state / 1e9:.1f} GB {where}, and {free / 1e9:.1f} GB are free"
        for where, (free, states) in room.items()
        if free < states * state
    ]
    if missing:
        sys.exit("this benchmark " + "\nand it ".join(missing))


def run(size: Size, parent: Path, folder: Path, rounds: int, length: int) -> dict[str, Any]:
    """Measure everything.

    Args:
        size: The model.
        parent: The parent of folders in memory.
        folder: Where to save to disk.
        rounds: How often each thing is measured.
        length: Training steps of a stretch.

    """
    state = State(size)
    facts: dict[str, Any] = {"state_bytes": state_bytes(state.model, state.optimizer)[1]}
    with memory_folder(parent):
        # Only now, as files of killed benchmarks are gone.
        check_room(facts["state_bytes"], parent, folder)
        # They are short, and other load on the machine makes some of them long.
        report.progress("saves to memory and to disk ...")
        samples = tiers_saves.stalls(state, size, folder, 3 * rounds)
    with memory_folder(parent) as memory:
        report.progress("restores and copies ...")
        restored, copied = tiers_restore.run(state, size, folder, memory, rounds)
    with memory_folder(parent) as memory:
        report.progress("training steps with copies and without ...")
        trained, late = tiers_saves.steps(state, size, folder, memory, rounds, length)
    return figures(samples | restored | trained, facts | copied | late)


def _options() -> argparse.Namespace:
    parser = report.arguments((__doc__ or "").split("\n")[0], rounds=7)
    parser.add_argument("--steps", type=int, default=4, help="training steps of a stretch that count (default 4)")
    return parser.parse_args()


def main() -> None:
    """Measure, print and write JSON."""
    options = _options()
    # As on Ctrl-C: otherwise files in memory would outlive the process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    rounds = options.rounds or (2 if options.quick else 7)
    parent = place_in_memory()
    with report.scratch(options.dir) as folder:
        found = run(TINY if options.quick else GPT2_SMALL, parent, folder.resolve(), rounds, options.steps)
    found["settings"] = {"fraction": FRACTION, "rounds": rounds, "steps": options.steps}
    # A tiny model's figures say nothing about the targets.
    aims = [] if options.quick else targets(found)
    columns = ["one thing against another", "first s", "second s", "floor s", "first over second"]
    report.show(f"memory before the disk, {found['state_bytes'] / 1e9:.2f} GB", columns, _rows(found), aims)
    report.write(options.json, found, aims)


if __name__ == "__main__":
    main()
