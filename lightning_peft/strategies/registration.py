"""Registers `peft_ddp` and `peft_fsdp` with every loaded Trainer and Fabric package."""

from __future__ import annotations

import importlib

from lightning_peft.trainers.packages import is_loaded, is_supported

__all__ = ["register_strategies"]

#: Package, its class that shows it is loaded, its registry, and our module for it.
_REGISTRIES = (
    ("lightning.pytorch", "Trainer", "StrategyRegistry", "lightning"),
    ("lightning.fabric", "Fabric", "STRATEGY_REGISTRY", "fabric"),
    ("pytorch_lightning", "Trainer", "StrategyRegistry", "pytorch_lightning"),
    ("lightning_fabric", "Fabric", "STRATEGY_REGISTRY", "lightning_fabric"),
)


def register_strategies() -> None:
    """Register the strategies with every package loaded so far.

    `import lightning_peft` and `PEFT(...)` call this. Call it yourself if `pytorch_lightning` was
    imported later and the Trainer gets ``strategy="peft_ddp"`` before any PEFT callback exists.
    """
    for package, shown_by, registry, module in _REGISTRIES:
        if not is_loaded(package, shown_by) or not is_supported(package):
            continue
        found = getattr(importlib.import_module(f"{package}.strategies"), registry)
        ours = importlib.import_module(f"lightning_peft.strategies.{module}")
        for strategy, description in (
            (ours.PEFTDDPStrategy, "DDP that sends only trained tensors"),
            (ours.PEFTFSDPStrategy, "FSDP2 with the packed base sharded by rows"),
        ):
            if strategy.strategy_name not in found:
                found.register(strategy.strategy_name, strategy, description=description)
