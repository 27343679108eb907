"""Strategies that know adapters: `Trainer(strategy="peft_ddp")` and `strategy="peft_fsdp"`.

Both are registered when this package is imported, which `import lightning_peft` does.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_peft.strategies.ddp import PEFTDDPStrategy
from lightning_peft.strategies.fsdp import PEFTFSDPStrategy

__all__ = ["PEFTDDPStrategy", "PEFTFSDPStrategy"]

for _strategy, _description in (
    (PEFTDDPStrategy, "DDP over what is trained; the frozen base is never sent"),
    (PEFTFSDPStrategy, "FSDP2 with the packed base sharded by rows"),
):
    if _strategy.strategy_name not in StrategyRegistry:
        StrategyRegistry.register(_strategy.strategy_name, _strategy, description=_description)
