"""The live training state as a save and a recovery see it: blocks, tensors, skeleton."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_scar.core.blocks import BlockMap, build_map
from lightning_scar.core.memory import readable
from lightning_scar.core.notices import Notices
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.shares import shares
from lightning_scar.core.skeleton import Leaf, Path, Skeleton, heavy, held_bytes, identity, take_apart
from lightning_scar.core.skeletons import describe, pack_skeleton
from lightning_scar.core.zero import is_sharded


@dataclass
class LiveState:
    """A checkpoint dict taken apart.

    Attributes:
        map: The blocks of the whole state.
        own: The blocks that this rank owns.
        tensors: The live tensors, by their place in the checkpoint.
        skeleton: The rest of the checkpoint.
        sharded: The places of dicts whose items are spread over the ranks.
        description: The map as text.
        heavy: Large tensors that cannot be cut into blocks, so that every skeleton holds them in full.

    """

    map: BlockMap
    own: BlockMap
    tensors: dict[Path, Tensor]
    skeleton: Skeleton
    sharded: list[Path]
    description: str
    heavy: list[Leaf]

    def of(self, block_map: BlockMap) -> list[list[Tensor]]:
        """Return the live tensors of every group of a map as rows, one per slot."""
        return [[group.of(self.tensors[slot.paths[0]]) for slot in group.slots] for group in block_map.groups]

    def warn_of_heavy(self, notices: Notices) -> None:
        """Warn once of large tensors that every save writes in full."""
        if self.heavy:
            names = [f"{'/'.join(map(str, path))} ({type(tensor).__name__})" for path, tensor in self.heavy[:3]]
            nbytes = readable(sum(held_bytes(tensor) for _, tensor in self.heavy))
            notices.warn(
                "heavy",
                f"{len(self.heavy)} tensors cannot be cut into blocks, so every save writes them in full ({nbytes}): "
                f"{', '.join(names)}{', ...' if len(self.heavy) > 3 else ''}",
            )

    def pack(self) -> tuple[memoryview, list[tuple[list[Path], Tensor]]]:
        """Return the skeleton's bytes for a delta, and its tensors on an accelerator, which are not packed."""
        here = [stack for stack in self.skeleton["counters"] if stack[1].device.type == "cpu"]
        away = [stack for stack in self.skeleton["counters"] if stack[1].device.type != "cpu"]
        skeleton = Skeleton(tree=self.skeleton["tree"], wrapped=self.skeleton["wrapped"], counters=here)
        return pack_skeleton(skeleton, self.description, self.sharded), away


class Dissection:
    """Takes checkpoint dicts of one training apart, and caches the block map while the state stays the same.

    Args:
        ranks: The ranks that share the blocks.
        block_size: Bytes of a parameter's rows in a block; ``None`` to choose it by the first state.

    Attributes:
        block_size: The block size, ``None`` until it is known.

    """

    def __init__(self, ranks: Ranks, block_size: int | None = None) -> None:
        self.block_size = block_size
        self._ranks = ranks
        self._signature: list[Any] | None = None
        self._map, self._own, self._description = BlockMap((), 0), BlockMap((), 0), ""
        self._heavy: list[Leaf] = []

    def take_apart(
        self,
        checkpoint: dict[str, Any],
        optimizers: Mapping[Path, Optimizer] | None = None,
        parameters: Iterable[Tensor] = (),
    ) -> LiveState:
        """Take a checkpoint dict apart.

        Args:
            checkpoint: The dict, with references to live tensors.
            optimizers: The live optimizers, by the places of their states in it.
            parameters: Tensors that change only in optimizer steps.

        """
        parameters, optimizers = [p for p in parameters if not is_lazy(p)], optimizers or {}
        skeleton, leaves = take_apart(checkpoint, {identity(p): True for p in parameters if p.dim() == 0})
        signature = [(leaf.path, identity(leaf.tensor)) for leaf in leaves]
        if signature != self._signature:
            states = {path: (optimizer, _at(checkpoint, path)) for path, optimizer in optimizers.items()}
            self._map = build_map(leaves, states, parameters, self.block_size)
            self.block_size = self._map.block_size
            self._own = shares(self._map, self._ranks.world_size)[self._ranks.rank]
            self._signature, self._description = signature, describe(self._map)
            self._heavy = list(heavy(skeleton["tree"]))
        sharded: list[Path] = [(*path, "state") for path, optimizer in optimizers.items() if is_sharded(optimizer)]
        tensors = {leaf.path: leaf.tensor for leaf in leaves}
        return LiveState(self._map, self._own, tensors, skeleton, sharded, self._description, self._heavy)


def live_parts(optimizers: Iterable[Optimizer], *modules: Module) -> dict[str, Any]:
    """Return the arguments of a save besides the checkpoint dict, which pair optimizer state with parameters.

    Args:
        optimizers: The optimizers, in the order of their states in the dict.
        modules: The modules whose parameters change only in optimizer steps.

    """
    places: dict[Path, Optimizer] = {("optimizer_states", i): optimizer for i, optimizer in enumerate(optimizers)}
    return {"optimizers": places, "parameters": chain.from_iterable(module.parameters() for module in modules)}


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value
