"""The live training state, as a save and a recovery see it: its blocks, its tensors, and the rest."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_scar.core.blocks import BlockMap, build_map
from lightning_scar.core.memory import readable
from lightning_scar.core.notices import Notices
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.shares import shares
from lightning_scar.core.skeleton import Leaf, Path, Skeleton, heavy, identity, take_apart
from lightning_scar.core.skeletons import describe, pack_skeleton
from lightning_scar.core.zero import is_sharded


@dataclass
class LiveState:
    """A checkpoint dict taken apart.

    Attributes:
        map: The blocks of the whole state.
        own: Those that this rank owns.
        tensors: The live tensors, by their place in the checkpoint.
        skeleton: What is left without them.
        sharded: The places of dicts of which each rank has some items only.
        description: The map as text.
        heavy: What is large and no blocks: it is in every skeleton as a whole.

    """

    map: BlockMap
    own: BlockMap
    tensors: dict[Path, Tensor]
    skeleton: Skeleton
    sharded: list[Path]
    description: str
    heavy: list[Leaf]

    def of(self, block_map: BlockMap) -> list[list[Tensor]]:
        """The live tensors of every group of a map as rows, one a slot."""
        return [[group.of(self.tensors[slot.paths[0]]) for slot in group.slots] for group in block_map.groups]

    def warn_of_heavy(self, notices: Notices) -> None:
        """Warns once of what every save writes as a whole."""
        if self.heavy:
            names = [f"{'/'.join(map(str, path))} ({type(tensor).__name__})" for path, tensor in self.heavy[:3]]
            nbytes = readable(sum(tensor.numel() * tensor.dtype.itemsize for _, tensor in self.heavy))
            notices.warn(
                "heavy",
                f"{len(self.heavy)} tensors cannot be cut into blocks, and every save writes them whole, {nbytes}: "
                f"{', '.join(names)}{', ...' if len(self.heavy) > 3 else ''}",
            )

    def pack(self) -> tuple[memoryview, list[tuple[list[Path], Tensor]]]:
        """The skeleton as it lies in a delta, and what of it lies on an accelerator and is not packed."""
        here = [stack for stack in self.skeleton["counters"] if stack[1].device.type == "cpu"]
        away = [stack for stack in self.skeleton["counters"] if stack[1].device.type != "cpu"]
        skeleton = Skeleton(tree=self.skeleton["tree"], counters=here)
        return pack_skeleton(skeleton, self.description, self.sharded), away


class Dissection:
    """Takes checkpoint dicts of one training apart, and remembers its block map as long as the state stays the same.

    Args:
        ranks: Among whom the blocks are divided.
        block_size: Bytes of a parameter's rows in a block; ``None`` for what suits the first state that is seen.

    Attributes:
        block_size: The same, once it is known.

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
        """Takes a checkpoint dict apart.

        Args:
            checkpoint: The dict, with references to live tensors.
            optimizers: The live optimizer for each place of an optimizer's state in it.
            parameters: Tensors that change at optimizer steps only.

        """
        parameters, optimizers = list(parameters), optimizers or {}
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


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value
