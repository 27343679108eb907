"""Registers `peft_ddp` and `peft_fsdp` with every loaded Trainer and Fabric package."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from lightning_peft.trainers.packages import is_loaded, is_supported

__all__ = ["register_strategies"]

#: Package, its class that shows it is loaded, its registry, and our module for it.
_REGISTRIES = (
    ("lightning.pytorch", "Trainer", "StrategyRegistry", "lightning"),
    ("lightning.fabric", "Fabric", "STRATEGY_REGISTRY", "fabric"),
    ("pytorch_lightning", "Trainer", "StrategyRegistry", "pytorch_lightning"),
    ("lightning_fabric", "Fabric", "STRATEGY_REGISTRY", "lightning_fabric"),
)

#: Name, class and description of each strategy.
_STRATEGIES = (
    ("peft_ddp", "PEFTDDPStrategy", "DDP that sends only trained tensors"),
    ("peft_fsdp", "PEFTFSDPStrategy", "FSDP2 with the packed base sharded by rows"),
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
        for name, cls, description in _STRATEGIES:
            if name not in found:
                found.register(name, partial(_create, module, cls), description=description)


def _create(module: str, cls: str, **options: Any) -> Any:
    """Called when a Trainer asks for the strategy: imports the class only then."""
    return getattr(importlib.import_module(f"lightning_peft.strategies.{module}"), cls)(**options)
