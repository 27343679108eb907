"""The two strategies for the Trainer of `pytorch_lightning`."""

from __future__ import annotations

from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

from lightning_peft.strategies.ddp import TrainerDDP
from lightning_peft.strategies.fsdp import TrainerFSDP

__all__ = ["PEFTDDPStrategy", "PEFTFSDPStrategy"]


class PEFTDDPStrategy(TrainerDDP, DDPStrategy):
    """DDP that sends only trained tensors, for the Trainer of `pytorch_lightning`."""


class PEFTFSDPStrategy(TrainerFSDP, ModelParallelStrategy):
    """FSDP2 with the packed base sharded by rows, for the Trainer of `pytorch_lightning`.

    The arguments are those of `TrainerFSDP`.
    """
