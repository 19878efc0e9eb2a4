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

from lightning_scar.loops import private
from lightning_scar.storage.delta import StorageError

MARK = "lightning_scar.json"


def watch_state_folders(accelerator: Accelerator) -> None:
    """Makes ``load_state`` refuse folders that a ``save_state`` from now on leaves unfinished.

    Args:
        accelerator: The accelerator. Its ``load_state`` raises a
            :class:`~lightning_scar.storage.delta.StorageError` that names the missing file.

    """

    def before_save(models: list[Any], weights: list[Any], folder: str) -> None:
        objects = len(private.custom_objects(accelerator))
        mark = {"processes": accelerator.num_processes, "objects": objects if accelerator.is_main_process else 0}
        # What an older save left there would look as if this one had come so far.
        for name in _last_files(mark, accelerator.process_index):
            (Path(folder) / name).unlink(missing_ok=True)
        if accelerator.is_main_process:
            (Path(folder) / MARK).write_text(json.dumps(mark))

    def before_load(models: list[Any], folder: str) -> None:
        for name in unfinished(Path(folder), accelerator.process_index):
            raise StorageError(
                f"{folder} is not complete: save_state was cut short before it had written {name}. Load another one; "
                "the running checkpoint is whole in any case."
            )

    accelerator.register_save_state_pre_hook(before_save)
    accelerator.register_load_state_pre_hook(before_load)


def unfinished(folder: Path, process: int) -> Iterator[str]:
    """The files that should have come last in a folder, but are missing or cut short.

    Args:
        folder: Of ``save_state``; one without a mark passes.
        process: The number of this process. Others may have written to disks of their own.

    """
    mark = folder / MARK
    if not mark.exists():
        return
    for name in _last_files(json.loads(mark.read_text()), process):
        if not ((folder / name).exists() and zipfile.is_zipfile(folder / name)):
            yield name


def _last_files(mark: dict[str, int], process: int) -> list[str]:
    own = [f"random_states_{process}.pkl"] if process < mark["processes"] else []
    return own + [f"custom_checkpoint_{i}.pkl" for i in range(mark["objects"])]
