"""How long a restore takes after many partial saves: ``python -m benchmarks.resume --json OUT``.

A running checkpoint of one full and forty partial saves is loaded into a live model and optimizer, alternating with
loads of the same state from a file of ``torch.save`` and one of safetensors; with the files in the page cache
(``*_s``) and after they were dropped from it (``*_cold_s``). SCAR verifies the checksums of all that it reads; the two
others have none. ``scar`` reads directly into the live tensors; ``scar_dict`` makes a checkpoint dict first, like all
others.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import report
from benchmarks.gpt import GPT, GPT2_SMALL, TINY, Size, state_bytes
from benchmarks.report import Target, median
from lightning_scar import load
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.settings import Settings

FRACTION = 0.125
PARTIAL_SAVES = 40


class Live:
    """A model and its optimizer, as in a training.

    Args:
        size: The model's dimensions.

    """

    def __init__(self, size: Size) -> None:
        self.model: nn.Module = GPT(size)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def checkpoint(self, step: int) -> dict[str, Any]:
        """Return the state as a checkpoint dict of Lightning's shape."""
        return {
            "state_dict": self.model.state_dict(),
            "optimizer_states": [self.optimizer.state_dict()],
            "global_step": step,
        }

    def flat(self) -> dict[str, Tensor]:
        """Return the state by name, for safetensors."""
        moments = self.optimizer.state_dict()["state"]
        return dict(self.model.state_dict()) | {
            f"{i}.{word}": value for i, state in moments.items() for word, value in state.items()
        }

    @torch.no_grad()
    def copy(self, source: Mapping[str, Tensor]) -> None:
        """Copy a state by name into the live tensors, unless it is there already."""
        for name, tensor in self.flat().items():
            if source[name].data_ptr() != tensor.data_ptr():
                tensor.copy_(source[name])

    @torch.no_grad()
    def perturb(self) -> None:
        """Change every tensor, some rows much more than others, so that the next save chooses scattered blocks."""
        for tensor in self.flat().values():
            if tensor.dim():
                scale = torch.rand(len(tensor)).pow_(16).mul_(1e-2).add_(1)
                tensor.mul_(scale.view(-1, *(1,) * (tensor.dim() - 1)))


def flattened(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return a checkpoint dict's tensors by the names that :meth:`Live.flat` gives them."""
    moments = checkpoint["optimizer_states"][0]["state"]
    return dict(checkpoint["state_dict"]) | {
        f"{i}.{word}": value for i, state in moments.items() for word, value in state.items()
    }


def write_running_checkpoint(live: Live, folder: Path) -> int:
    """Make one full save and many partial ones, with changes between them.

    Args:
        live: What to save.
        folder: Where to save.

    Returns:
        The number of saves.

    """
    with RunningCheckpoint(folder, Settings(fraction=FRACTION)) as running:
        for step in range(1 + PARTIAL_SAVES):
            running.save_now(
                live.checkpoint(step),
                step,
                optimizers={("optimizer_states", 0): live.optimizer},
                parameters=live.model.parameters(),
            )
            report.progress(f"save {step + 1} of {1 + PARTIAL_SAVES}")
            while running._writer.depth:  # A save must not be skipped because the one before it is still being written.
                time.sleep(0.001)
            live.perturb()
        return running.stats.saves


@dataclass(frozen=True)
class Source:
    """One way to restore.

    Attributes:
        name: Its name.
        path: Its file or folder.
        load: Loads it as tensors by name.

    """

    name: str
    path: Path
    load: Callable[[Path], Mapping[str, Tensor]]


def write_sources(live: Live, folder: Path) -> tuple[list[Source], int]:
    """Write the running checkpoint, and its state in the formats of the peers.

    Args:
        live: What to save.
        folder: Where to save.

    Returns:
        The ways to restore, and the number of saves in the running checkpoint.

    """
    saves = write_running_checkpoint(live, folder / "scar")
    live.copy(flattened(load(folder / "scar")))
    torch.save(live.checkpoint(PARTIAL_SAVES), folder / "torch.ckpt")
    save_file(live.flat(), folder / "state.safetensors")
    os.sync()
    sources = [
        Source("scar", folder / "scar", lambda path: flattened(load(path, into=live.checkpoint(0)))),
        Source("scar_dict", folder / "scar", lambda path: flattened(load(path))),
        Source("torch", folder / "torch.ckpt", lambda path: flattened(torch.load(path))),
        Source("torch_mmap", folder / "torch.ckpt", lambda path: flattened(torch.load(path, mmap=True))),
        Source("safetensors", folder / "state.safetensors", load_file),
    ]
    return sources, saves


def files(path: Path) -> list[Path]:
    """Return a file, or all files of a folder."""
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def evict(path: Path) -> None:
    """Drop a file, or all files of a folder, from the page cache; they must be on disk already."""
    for file in files(path):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def restore(live: Live, source: Source) -> float:
    """Restore the live state from a source; return the seconds this took."""
    started = time.perf_counter()
    live.copy(source.load(source.path))
    return time.perf_counter() - started


def measure(live: Live, sources: list[Source], rounds: int) -> dict[str, list[float]]:
    """Restore from every source in turn, first cold, then warm.

    Args:
        live: What to restore into.
        sources: The sources.
        rounds: How often to restore from each.

    """
    samples: dict[str, list[float]] = {}
    for number in range(rounds):
        for source in sources:
            report.progress(f"round {number + 1} of {rounds}: {source.name}")
            evict(source.path)
            samples.setdefault(f"{source.name}_cold_s", []).append(restore(live, source))
            # A cold read may leave gaps in the cache: read once more before it counts as warm.
            restore(live, source)
            samples.setdefault(f"{source.name}_s", []).append(restore(live, source))
    return samples


def verify(live: Live, sources: list[Source]) -> None:
    """Check that every source restores the same state, bit for bit."""
    expected = {name: tensor.clone() for name, tensor in live.flat().items()}
    for source in sources:
        live.perturb()
        restore(live, source)
        different = [name for name, tensor in live.flat().items() if not torch.equal(tensor, expected[name])]
        assert not different, f"{source.name} restored other values of {different[:3]}"


def targets(found: dict[str, Any]) -> list[Target]:
    """Return the targets."""
    return [
        Target("scar_over_torch", found["scar_over_torch"], 0.5),
        Target("scar_cold_over_safetensors", found["scar_cold_over_safetensors"], 1.2),
    ]


def run(size: Size, folder: Path, rounds: int) -> dict[str, Any]:
    """Write everything, verify and measure it.

    Args:
        size: The model.
        folder: Where to write.
        rounds: How often each thing is measured.

    """
    live = Live(size)
    sources, saves = write_sources(live, folder)
    verify(live, sources)
    samples = measure(live, sources, rounds)
    found: dict[str, Any] = {key: median(values) for key, values in samples.items()}
    found["scar_over_torch"] = found["scar_s"] / found["torch_s"]
    found["scar_cold_over_safetensors"] = found["scar_cold_s"] / found["safetensors_cold_s"]
    found["saves"] = saves
    found["state_bytes"] = state_bytes(live.model, live.optimizer)[1]
    found["scar_files"] = len(files(folder / "scar"))
    found["scar_disk_bytes"] = sum(file.stat().st_size for file in files(folder / "scar"))
    return {**found, "samples": samples, "settings": {"fraction": FRACTION, "rounds": rounds}}


def main() -> None:
    """Measure, print and write JSON."""
    options = report.arguments((__doc__ or "").split("\n")[0], rounds=7).parse_args()
    rounds = options.rounds or (2 if options.quick else 7)
    with report.scratch(options.dir) as folder:
        found = run(TINY if options.quick else GPT2_SMALL, folder, rounds)
    names = [key.removesuffix("_cold_s") for key in found["samples"] if key.endswith("_cold_s")]
    rows = [[name, f"{found[f'{name}_s']:.3f}", f"{found[f'{name}_cold_s']:.3f}"] for name in names]
    title = f"restore of {found['state_bytes'] / 1e9:.2f} GB after {found['saves']} saves"
    aims = [] if options.quick else targets(found)
    report.show(title, ["source", "warm s", "cold s"], rows, aims)
    report.write(options.json, found, aims)


if __name__ == "__main__":
    main()
