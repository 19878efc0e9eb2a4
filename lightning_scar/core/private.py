"""The private part of ``torch.distributed`` that the front doors lean on.

It stands behind one function here, which has a test that fails loudly when torch changes.
"""

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]


def default_store() -> Store:
    """The store through which the default process group was formed; every group has one of its own."""
    return dist.distributed_c10d._get_default_store()
