"""The private API of ``torch.distributed`` that this library uses.

It is wrapped in one function, with a test that fails when torch changes.
"""

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]


def default_store() -> Store:
    """Return the store of the default process group; every group has its own."""
    return dist.distributed_c10d._get_default_store()
