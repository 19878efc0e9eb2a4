"""What ``accelerator.save_state`` did not finish, ``accelerator.load_state`` does not load.

Accelerate writes a state as several files, one after the other. A pre-hook leaves a mark that says which come last;
another one looks for these before anything is loaded. No file is written otherwise than by Accelerate itself.
"""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lightning_scar import _accelerate
from lightning_scar.storage.delta import StorageError

MARK = "lightning_scar.json"
#: Seconds by which the clocks of those who write may differ.
_CLOCKS = 2.0


def watch_state_folders(accelerator: Accelerator) -> None:
    """Makes ``load_state`` refuse folders that a ``save_state`` from now on leaves unfinished.

    Args:
        accelerator: The accelerator. Its ``load_state`` raises a
            :class:`~lightning_scar.storage.delta.StorageError` that names the missing file.

    """

    def before_save(models: list[Any], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            objects = len(_accelerate.custom_objects(accelerator))
            (Path(folder) / MARK).write_text(json.dumps({"processes": accelerator.num_processes, "objects": objects}))

    def before_load(models: list[Any], folder: str) -> None:
        for name in unfinished(Path(folder), accelerator.process_index):
            raise StorageError(
                f"{folder} is not complete: save_state was cut short before it had written {name}. Load another one; "
                "the running checkpoint is whole in any case."
            )

    accelerator.register_save_state_pre_hook(before_save)
    accelerator.register_load_state_pre_hook(before_load)


def unfinished(folder: Path, process: int) -> Iterator[str]:
    """The files that should have come last in a folder, but are missing, cut short or older than the save.

    Args:
        folder: Of ``save_state``; one without a mark passes.
        process: The number of this process. Others may have written to disks of their own.

    """
    mark = folder / MARK
    if not mark.exists():
        return
    said = json.loads(mark.read_text())
    names = [f"random_states_{process}.pkl"] if process < said["processes"] else []
    names += [f"custom_checkpoint_{i}.pkl" for i in range(said["objects"])]
    for name in names:
        path = folder / name
        is_new = path.exists() and path.stat().st_mtime > mark.stat().st_mtime - _CLOCKS
        if not (is_new and zipfile.is_zipfile(path)):
            yield name
