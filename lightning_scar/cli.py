"""The command ``lightning-scar``: run scripts that survive lost workers; inspect, verify, export checkpoints."""

import math
import os
import pickle
import sys
from collections.abc import Callable
from io import BytesIO
from typing import Any

import jsonargparse
import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_scar.core.memory import readable
from lightning_scar.core.recovery import known_distance, known_rework
from lightning_scar.core.restoration import NoCheckpointError, load
from lightning_scar.core.skeletons import is_skeleton
from lightning_scar.storage.delta import StorageError, StoredBlock
from lightning_scar.storage.directory import Directory, Tier
from lightning_scar.storage.places import open_store
from lightning_scar.storage.store import DeltaStore, rank_folder, rank_of, retry_vanished


def run() -> int:
    """Run a script in several workers, and replace those that die; see ``lightning-scar run --help``."""
    raise NotImplementedError("it has a command line of its own")


def inspect(dir: str, storage_options: dict[str, Any] | None = None) -> int:
    """Show what a running checkpoint holds: blocks, ages, bytes, steps.

    Args:
        dir: The running checkpoint's directory, a path or any fsspec URL.
        storage_options: Passed to the file system.

    """
    store = _opened(dir, storage_options)
    console = Console()
    console.print(_summary(store))
    console.print(_ranks(store))
    console.print(_tensors(store))
    for damage in store.damaged:
        console.print(f"[red]damaged[/]: {damage}")
    return 0


def verify(dir: str, storage_options: dict[str, Any] | None = None) -> int:
    """Read every block that counts and check its checksum; exit with 1 if any is damaged.

    Args:
        dir: The running checkpoint's directory, a path or any fsspec URL.
        storage_options: Passed to the file system.

    """
    store = _opened(dir, storage_options)
    damages = store.verify()
    console = Console(soft_wrap=True)
    for damage in damages:
        console.print(f"[red]damaged[/]: {damage}", highlight=False)
    if damages:
        console.print(f"{len(damages)} damaged places. Loading falls back to the older version of such a block.")
        return 1
    blocks = sum(len(store.index.live(delta)) for delta in store.deltas)
    console.print(f"{dir} is intact: {blocks} blocks in {len(store.deltas)} files.", highlight=False)
    return 0


def export(
    dir: str,
    out: str,
    consistent: bool = False,
    weights_only: bool = True,
    overwrite: bool = False,
    storage_options: dict[str, Any] | None = None,
) -> int:
    """Write a running checkpoint as one file.

    Args:
        dir: The running checkpoint's directory, a path or any fsspec URL.
        out: ``*.ckpt`` for a checkpoint that plain Lightning loads, ``*.safetensors`` for the model's weights.
        consistent: Take the newest full save, all blocks of one step, instead of the newest version of every block.
        weights_only: Refuse a skeleton with anything but plain values; ``false`` only for a checkpoint you trust.
        overwrite: Replace ``out`` if it exists.
        storage_options: Passed to the file system of ``dir``.

    """
    folder, name = os.path.split(out)
    target = Directory(folder or ".")
    if name in target.names() and not overwrite:
        raise StorageError(f"{out} exists; choose another name, or pass --overwrite=true")
    encode = _encoder(out)
    try:
        checkpoint = load(dir, consistent=consistent, weights_only=weights_only, storage_options=storage_options)
    except pickle.UnpicklingError as error:
        raise StorageError(f"{error}\nIf you trust {dir}, pass --weights_only=false.") from None
    target.create()
    target.write(name, [encode(checkpoint)])
    print(f"Wrote step {checkpoint.get('global_step', '?')} of {dir} to {out}.")
    return 0


def main() -> None:
    """Run a command that looks at checkpoints."""
    commands: Any = {"run": run, "inspect": inspect, "verify": verify, "export": export}
    try:
        sys.exit(jsonargparse.auto_cli(commands, prog="lightning-scar", description=__doc__))
    except (StorageError, OSError, ValueError) as error:
        sys.exit(f"lightning-scar: {error}")


def _opened(dir: str, storage_options: dict[str, Any] | None) -> DeltaStore:
    store = open_store(dir, storage_options)
    retry_vanished(store.refresh)
    if not list(store.index.keys()):
        reasons = "".join(f"\n  {damage}" for damage in store.damaged)
        raise NoCheckpointError(f"{dir} holds no running checkpoint{reasons}")
    return store


def _encoder(out: str) -> Callable[[dict[str, Any]], bytes]:
    if out.endswith(".ckpt"):
        return _torch_file
    if out.endswith(".safetensors"):
        return _weights_file
    raise ValueError(f"cannot tell the format of {out!r}; give it the extension .ckpt or .safetensors")


def _torch_file(checkpoint: dict[str, Any]) -> bytes:
    buffer = BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def _weights_file(checkpoint: dict[str, Any]) -> bytes:
    weights = {name: value for name, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
    # The format has no shared tensors: write tied weights under each of their names.
    return safetensors.torch.save({name: value.clone().contiguous() for name, value in weights.items()})


def _summary(store: DeltaStore) -> Table:
    heads, consistent = store.index.heads, store.index.consistent
    head = max(heads.values(), key=lambda head: head.step)
    newest = _newest(store)
    oldest_age = max(head.info["oldest_age"] for head in heads.values())
    distance, rework = known_distance(heads), known_rework(heads)
    table = Table(title=f"Running checkpoint {store.directory}", show_header=False, title_justify="left")
    kinds = [delta.head.kind for delta in store.deltas]
    rows = {
        "step": f"{head.step}{' (finished)' if head.info.get('finished') else ''}",
        "age of the oldest block that has changed": f"{oldest_age} steps",
        "distance of the live state when it was saved": f"{distance:.4g}" if distance is not None else "not known",
        "refresh": _refresh(store),
        "cost of a crash then": f"about {rework:.3g} steps" if rework is not None else "not known",
        "newest consistent state": f"step {consistent.step}" if consistent else "none",
        "blocks": f"{len(newest)}, {readable(sum(block.nbytes for block in newest))}",
        "files": f"{len(kinds)} ({', '.join(f'{kinds.count(k)} {k}' for k in sorted(set(kinds)))}), "
        f"{readable(sum(delta.nbytes for delta in store.deltas))}",
        "starts": str(len(store.index.lineage)),
    }
    if in_memory := [delta.nbytes for delta in store.deltas if delta.directory.tier(delta.name) is Tier.MEMORY]:
        rows["of these in this host's memory"] = f"{len(in_memory)}, {readable(sum(in_memory))}"
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _refresh(store: DeltaStore) -> str:
    """Describe the refresh: its share of the bytes and what it does for the distance."""
    by_age = sorted(store.deltas, key=lambda delta: delta.head.recency)
    newest = {delta.head.rank: delta for delta in by_age if delta.head.kind != "compacted"}
    deltas = [delta for delta in newest.values() if delta.refreshes]
    if not deltas:
        return "none"
    bases = [delta.head.info["distance_of_bases"] for delta in deltas]
    share = sum(delta.refresh_bytes for delta in deltas) / sum(delta.nbytes for delta in deltas)
    return f"{share:.0%} of the bytes of the last save; without it the distance would be {math.hypot(*bases):.4g}"


def _ranks(store: DeltaStore) -> Table:
    heads = store.index.heads
    world_size = max(head.world_size for head in heads.values())
    table = Table(title="What every rank saved last", title_justify="left")
    for column in ("rank", "step", "owns", "age of its oldest block", "distance", "files", "bytes"):
        table.add_column(column, justify="right")
    for folder in sorted({*store.folders(), *map(rank_folder, range(world_size))}):
        rank, files = rank_of(folder), [delta for delta in store.deltas if rank_of(delta.name) == rank_of(folder)]
        disk = [str(len(files)), readable(sum(delta.nbytes for delta in files))]
        if head := heads.get(rank):
            age, distance = f"{head.info['oldest_age']} steps", f"{head.info['distance']:.4g}"
            table.add_row(str(rank), str(head.step), readable(head.state_bytes), age, distance, *disk)
        else:
            lost = "nothing since the start" if files else "nothing is there"
            what = lost if rank < world_size else "of an earlier start"
            table.add_row(str(rank), what, "", "", "", *disk)
    return table


def _tensors(store: DeltaStore) -> Table:
    by_tensor: dict[str, list[StoredBlock]] = {}
    for block in _newest(store):
        by_tensor.setdefault(block.key.rsplit("[", 1)[0], []).append(block)
    table = Table(title="Newest version of every tensor's blocks", title_justify="left")
    for column in ("tensor", "slots"):
        table.add_column(column, overflow="fold")
    for column in ("blocks", "bytes", "newest step", "oldest step"):
        table.add_column(column, justify="right")
    for name, blocks in by_tensor.items():
        steps = [block.version.step for block in blocks]
        size = readable(sum(block.nbytes for block in blocks))
        table.add_row(name, ", ".join(blocks[0].slots), str(len(blocks)), size, str(max(steps)), str(min(steps)))
    return table


def _newest(store: DeltaStore) -> list[StoredBlock]:
    keys = sorted(store.index.keys())
    return [block for key in keys if (block := store.index.newest(key)) is not None and not is_skeleton(key)]
