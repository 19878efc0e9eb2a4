"""For tests on machines without a GPU: importing it registers the backend ``"nccl_like"``."""

from lightning_scar.testing.nccl_like import NAME, NCCLLikeGroup, register

__all__ = ["NAME", "NCCLLikeGroup", "register"]

register()
