"""The two strategies for the Trainer of `lightning.pytorch`."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_peft.strategies.ddp import TrainerDDP
from lightning_peft.strategies.fsdp import TrainerFSDP

__all__ = ["PEFTDDPStrategy", "PEFTFSDPStrategy"]


class PEFTDDPStrategy(TrainerDDP, DDPStrategy):
    """DDP that sends only trained tensors, for the Trainer of `lightning`."""


class PEFTFSDPStrategy(TrainerFSDP, ModelParallelStrategy):
    """FSDP2 with the packed base sharded by rows, for the Trainer of `lightning`.

    The arguments are those of `TrainerFSDP`.
    """
