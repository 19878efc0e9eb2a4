"""For :mod:`benchmarks.tiers`: how long a restore takes from each tier, and how fast copies go to another host.

A process saves to memory and to disk and kills itself, so that both hold the same state. It is then read into live
tensors, in turn from its memory, from disk, and as after the loss of a host: what only its neighbour's memory has is
copied to disk and read there.
"""

import os
import shutil
import signal
import time
import zlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from benchmarks.gpt import Size
from benchmarks.ranks import State
from benchmarks.resume import evict, flattened
from benchmarks.tiers_peers import PlainCopy, new_chain, other_process, serve, sink, wait_for_copies
from benchmarks.tiers_saves import Samples
from lightning_scar.core.restoration import restore
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings
from lightning_scar.core.skeleton import Path as Place
from lightning_scar.storage.chain import Chain
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.host_memory import HostMemory
from lightning_scar.storage.lease import run_of
from lightning_scar.storage.places import Places, open_store
from lightning_scar.storage.store import DeltaStore, rank_folder
from lightning_scar.storage.write_back import bring_in

#: Partial saves after the first: what is read is spread over several files, as after a training.
_SAVES = 8
#: Bytes per write to newly allocated memory.
_PIECE = 1 << 21


def checksums(checkpoint: dict[str, Any]) -> dict[str, int]:
    """Return the checksum of every tensor."""
    return {name: zlib.crc32(tensor.reshape(-1).numpy().data) for name, tensor in flattened(checkpoint).items()}


@torch.no_grad()
def _move_a_part(state: State, part: int) -> None:
    state.step += 1
    for tensor in flattened(state.checkpoint()).values():
        if tensor.dim():
            tensor[part * len(tensor) // _SAVES : (part + 1) * len(tensor) // _SAVES].mul_(1.01)


def _save_and_die(size: Size, url: Path, connection: Connection) -> None:
    """Save to both places; the object is the checksums of what was saved."""
    state = State(size)
    running = RunningCheckpoint(url, Settings(fraction=1.0, memory=True, durable_every_n_saves=1))
    for part in range(-1, _SAVES):
        if part >= 0:
            _move_a_part(state, part)
        optimizers: dict[Place, Optimizer] = {("optimizer_states", 0): state.optimizer}
        running.save_now(
            state.checkpoint(), state.step, optimizers=optimizers, parameters=list(state.model.parameters())
        )
        running.flush()
    os.sync()
    connection.send(checksums(state.checkpoint()))
    os.kill(os.getpid(), signal.SIGKILL)


class Restores:
    """The ways to restore a state that a dead process has left.

    Args:
        state: The live state to restore into.
        url: The directory.
        memory: The files left in memory.

    """

    def __init__(self, state: State, url: Path, memory: HostMemory) -> None:
        self._state = state
        self._url = url
        self._memory = memory
        self._stores: dict[str, Callable[[], DeltaStore]] = {
            "own": lambda: open_store(url),
            "neighbour": self._brought,
            "disk": lambda: DeltaStore(url),
        }
        self._ready = [tensor.clone() for tensor in flattened(state.checkpoint()).values()]

    def _brought(self) -> DeltaStore:
        """Return the store as the next start finds it if only a neighbour's memory has the state."""
        shutil.rmtree(anew := self._url.with_name("brought"), ignore_errors=True)
        bring_in(Places(Directory(anew)), self._memory, 0, 1)
        return DeltaStore(anew)

    @torch.no_grad()
    def restore(self, name: str) -> tuple[float, str]:
        """Read everything into the live state; return the seconds this took, and the source."""
        live = self._state.checkpoint()
        started = time.perf_counter()
        restored = restore(self._stores[name](), into=live)
        found = flattened(restored.checkpoint)
        for place, tensor in flattened(live).items():
            if found[place].data_ptr() != tensor.data_ptr():
                tensor.copy_(found[place])
        return time.perf_counter() - started, str(restored.plan)

    @torch.no_grad()
    def verify(self, expected: dict[str, int]) -> None:
        """Check that all restore what was saved, bit for bit, from the right source."""
        sources = {"own": "this host's memory", "neighbour": "newest versions", "disk": "newest versions"}
        for name, source in sources.items():
            for tensor in flattened(self._state.checkpoint()).values():
                tensor.zero_()
            _, plan = self.restore(name)
            others = [word for word in sources.values() if word != source and word in plan]
            assert source in plan, f"{name}: {plan}"
            assert not others, f"{name}: {plan}"
            assert checksums(self._state.checkpoint()) == expected, f"{name} restored other values than were saved"

    @torch.no_grad()
    def _copy(self) -> float:
        """Copy everything with all cores, the least that a restore from memory has to do; return the seconds."""
        live = list(flattened(self._state.checkpoint()).values())
        started = time.perf_counter()
        for tensor, ready in zip(live, self._ready, strict=True):
            tensor.copy_(ready)
        return time.perf_counter() - started

    def measure(self, samples: Samples) -> None:
        """Measure each once; before all but the warm restore, drop files on disk from the page cache."""
        for name in ("own", "neighbour", "disk"):
            evict(self._url)
            key = "disk_cold_s" if name == "disk" else f"{name}_s"
            samples.setdefault(key, []).append(self.restore(name)[0])
        # A cold read may leave gaps in the cache: read once more before it counts as warm.
        self.restore("disk")
        samples.setdefault("disk_warm_s", []).append(self.restore("disk")[0])
        samples.setdefault("copy_s", []).append(self._copy())


def _replicate(memory: Directory, folder: Path, address: tuple[str, int]) -> tuple[float, float]:
    """Return the seconds of a first copy to another host, and of replacing each of its files by a newer one."""
    chain = new_chain(memory, folder, address)
    files = sorted(Path(memory.file(rank_folder(0))).glob("*.safetensors"))
    try:
        first = _follow(chain)
        # One by one, as saves come.
        return first, sum(_replace_and_follow(chain, path) for path in files)
    finally:
        chain.close()


def _replace_and_follow(chain: Chain, path: Path) -> float:
    path.rename(path.with_name(f"next-{path.name}"))
    return _follow(chain)


def _follow(chain: Chain) -> float:
    started = time.perf_counter()
    chain.follow()
    wait_for_copies(chain)
    return time.perf_counter() - started


def _write_anew(folder: Path, size: int) -> float:
    """Return the seconds to write ``size`` bytes to newly allocated memory: the least that a first copy does."""
    piece, path = os.urandom(_PIECE), folder / "anew"
    started = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for at in range(0, size, _PIECE):
            file.write(piece[: size - at])
    took = time.perf_counter() - started
    path.unlink()
    return took


def run(state: State, size: Size, folder: Path, memory: Path, rounds: int) -> tuple[Samples, dict[str, Any]]:
    """Restore and replicate what a dead process has left.

    Args:
        state: A live state.
        size: The size of its model.
        folder: Where to save to disk.
        memory: This host's memory.
        rounds: How often each thing is measured.

    Returns:
        The samples, and the number of bytes copied.

    """
    url = folder / "dead"
    with other_process(_save_and_die, size, url) as expected:
        pass
    directory = Directory(url)
    left = HostMemory(directory, str(run_of(directory)))
    samples: Samples = {}
    restores = Restores(state, url, left)
    restores.verify(expected)
    for _ in range(rounds):
        restores.measure(samples)
    return samples, _copies(left, folder / "addresses", memory, rounds, samples)


def _copies(source: Directory, addresses: Path, memory: Path, rounds: int, samples: Samples) -> dict[str, int]:
    files = list(Path(source.file(rank_folder(0))).glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    there = memory / "there"
    there.mkdir(mode=0o700)
    with other_process(serve, there) as server, other_process(sink, size) as address:
        plain = PlainCopy(address, size)
        for counts in [False] + [True] * rounds:
            # Just before the first copy, so that both get pages of the same kind.
            took = {"anew_s": _write_anew(memory, size)}
            shutil.rmtree(there / rank_folder(0), ignore_errors=True)
            took["first_copy_s"], took["replication_s"] = _replicate(source, addresses, server)
            took["socket_s"] = plain.measure()
            for key, seconds in took.items() if counts else ():
                samples.setdefault(key, []).append(seconds)
        plain.close()
    return {"replicated_bytes": size, "replicated_files": len(files)}
