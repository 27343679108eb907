"""The two strategies for `lightning_fabric`, which `pytorch_lightning` is built on."""

from __future__ import annotations

from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

from lightning_peft.strategies.ddp import FabricDDP
from lightning_peft.strategies.fabric_fsdp import FabricFSDP

__all__ = ["PEFTDDPStrategy", "PEFTFSDPStrategy"]


class PEFTDDPStrategy(FabricDDP, DDPStrategy):
    """DDP that sends only trained tensors, for `lightning_fabric`."""


class PEFTFSDPStrategy(FabricFSDP, ModelParallelStrategy):
    """FSDP2 with the packed base sharded by rows, for `lightning_fabric`.

    The arguments are those of `FabricFSDP`.
    """
