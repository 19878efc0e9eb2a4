"""What is on disk, block by block, compared with what was live at the steps that it claims."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_scar.core.blocks import rows
from lightning_scar.core.codec import Codec, decode, encode
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.reader import Reader
from lightning_scar.core.restoration import restore
from lightning_scar.storage.places import open_store

#: A place in a checkpoint.
Path = tuple[str | int, ...]
#: The step of a block's base, and that of its refresh if it has one.
Steps = tuple[int, int | None]


class Refreshed(NamedTuple):
    """A block in low precision: the step of the refresh, how it is encoded, and what comes of it."""

    step: int
    codec: Codec
    values: Tensor
    is_difference: bool


class Saved(NamedTuple):
    """One slot of a block on disk: its key, its place, its rows; the step of its base, the base, and its refresh."""

    key: str
    path: Path
    span: slice
    step: int
    base: Tensor
    refreshed: Refreshed | None


def at(checkpoint: Any, path: Path) -> Any:
    for key in path:
        checkpoint = checkpoint[key]
    return checkpoint


def saved_blocks(dirpath: Any) -> Iterator[Saved]:
    """Every block and slot of a running checkpoint."""
    store = open_store(dirpath)
    restored = restore(store)
    reader = Reader(store, restored.map, restored.plan, Ranks())
    reader.read()
    for group, bases in zip(reader.groups, reader.tensors(), strict=True):
        for i, key in enumerate(map(group.key, range(len(group)))):
            block, span = restored.plan[key].versions[0].block, slice(*group.span(i))
            newest = next(iter(store.index.refreshes(block)), None)
            for number, (slot, base) in enumerate(zip(group.slots, bases, strict=True)):
                value, refreshed = rows(at(restored.checkpoint, slot.paths[0]))[span], None
                if newest is not None and slot.name in newest.refresh.slots:
                    codec = Codec.parse(newest.refresh.slots[slot.name].codec)
                    refreshed = Refreshed(newest.delta.head.step, codec, value, is_difference=number == 0)
                else:
                    assert torch.equal(value, rows(base)[span]), f"{key} ({slot.name}) is not its base"
                yield Saved(key, slot.paths[0], span, block.version.step, rows(base)[span], refreshed)


def assert_as_lived(dirpath: Any, lived: Callable[[Saved, int], Tensor]) -> set[Steps]:
    """Every block on disk is what it was at its steps: the base bit for bit, the refresh as near as its codec can be.

    Args:
        dirpath: The running checkpoint.
        lived: Gives the rows of a block as they were at a step.

    Returns:
        The steps of all blocks.

    """
    steps = set()
    for saved in saved_blocks(dirpath):
        what = f"{saved.key} ({saved.path})"
        assert torch.equal(saved.base, lived(saved, saved.step)), f"{what} is not what it was at step {saved.step}"
        if saved.refreshed is not None:
            _assert_near(saved.refreshed, saved.base, lived(saved, saved.refreshed.step), what)
        steps.add((saved.step, saved.refreshed and saved.refreshed.step))
    return steps


def _assert_near(refreshed: Refreshed, base: Tensor, live: Tensor, what: str) -> None:
    what = f"the refresh of {what} is not of step {refreshed.step}"
    from_base = base.double() if refreshed.is_difference else torch.zeros(base.shape, dtype=torch.float64)
    error = (refreshed.values.double() - live.double()).abs()
    rounding = 2 * torch.finfo(base.dtype).eps * torch.maximum(live.double().abs(), from_base.abs())
    assert bool((error <= _stated_error(refreshed.codec, live.double() - from_base) + rounding).all()), what
    # Had some values been read a step earlier or later, the error might still be a small one, but not the codes.
    assert torch.equal(refreshed.values, _refreshed_anew(refreshed, base, live)), what


def _stated_error(codec: Codec, x: Tensor) -> Tensor:
    """What the codec's documentation says that a value is off by at most, in a tile as large as the block."""
    if codec.kind == "linear":
        largest = x.abs().max()
        return (
            2 * largest
            if codec.bits == 2
            else torch.minimum(x.abs(), largest * 1.012 / 2 / (2 ** (codec.bits - 1) - 1))
        )
    positive = x[x > 0].float()
    if not len(positive):
        return torch.zeros_like(x)
    patterns = positive.view(torch.int32)
    # Rounded down and up to bfloat16.
    spacing = (int(patterns.max()) - int(patterns.min()) + 2 * 2**16) / (2**codec.bits - 2)
    found = torch.zeros_like(x)
    above = (patterns + int(spacing / 2) + 1).view(torch.float32).double()
    found[x > 0] = above - positive.double()
    return found


def _refreshed_anew(refreshed: Refreshed, base: Tensor, live: Tensor) -> Tensor:
    """What the live state would be refreshed to."""
    against, n = base.unsqueeze(0) if refreshed.is_difference else None, live.numel()
    codes, scales = refreshed.codec.empty(1, n)
    encode(refreshed.codec, live.unsqueeze(0), against, codes=codes, scales=scales)
    values = decode(refreshed.codec, codes, scales, n).view(live.shape)
    if refreshed.is_difference:
        values = base.to(torch.promote_types(base.dtype, torch.float32)) + values
    return values.to(base.dtype)
